"""upit-merge: instruction-tuning checkpoints in, a mixture of experts out.

An extension to mergekit that implements UpIT (arXiv 2410.01610). Importing this package loads
nothing else: the interpreter imports it at start-up (see `plugin.hook`).
"""

__version__ = "0.5.0"
