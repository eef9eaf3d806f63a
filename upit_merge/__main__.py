"""`python -m upit_merge`, hence also `torchrun -m upit_merge run …`."""

from upit_merge.cli.main import main

main(prog_name="upit-merge")
