"""Of what the libraries below say, only what is news to somebody who trains an expert."""

from __future__ import annotations

import logging
import warnings

# Weights that are read by other means, settings that are compared already, and file systems.
_NO_NEWS = (
    "keys in the checkpoint model loaded",
    "arguments do not match the ones",
    "mtime may not be reliable",
)
_LOGGERS = ("transformers.trainer", "transformers.trainer_utils")


def quieten() -> None:
    """Silence other progress bars, and advice that is for those who call TRL."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*", category=UserWarning)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _NO_NEWS)
