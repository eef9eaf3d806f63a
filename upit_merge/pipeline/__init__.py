"""`upit-merge pipeline`: from a dense model to a finished mixture, stage by stage."""
