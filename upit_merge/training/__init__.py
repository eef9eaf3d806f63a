"""Stages 1 and 4: fine-tuning on TRL's `SFTTrainer`, of dense models and of mixtures."""
