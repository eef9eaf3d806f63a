"""Models to talk to, and what is said: of `chat`, and of the samples on a card."""
