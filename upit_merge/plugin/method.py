"""The glue to mergekit: the method by name, its recipe, its options. No logic of our own."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from upit_merge.config.explain import check_yaml_size
from upit_merge.config.recipe import METHOD, parse_recipe, parse_recipe_text
from upit_merge.errors import UpitError

LOG = logging.getLogger(__name__)

# mergekit options that change nothing here, with the reason, told when one is used.
NO_EFFECT = {
    "allow_crimes": "all models must share one architecture",
    "unsafe_truncate_embeddings": "all models must share one vocabulary",
    "lora_merge_cache": "adapters are applied as they are read, nothing is merged first",
    "lora_merge_dtype": "adapters are applied in float32",
    "low_cpu_memory": "memory does not depend on the model's size anyway",
    "clone_tensors": "tensors are streamed to disk one by one",
    "read_to_gpu": "blocks always go straight to the device",
    "async_write": "reading, arithmetic and writing always overlap",
    "write_threads": "reading, arithmetic and writing always overlap",
}


def register_method(merge_methods: ModuleType) -> None:
    """Make `upit` one of mergekit's methods, by name."""
    from mergekit.merge_methods.base import (
        BasePolicy,
        GroupMergeMethod,
        InputContract,
        MergeMethodSpec,
        TensorGroup,
    )

    class UpitMethod(GroupMergeMethod):
        """Known to mergekit by name; the work is done by `run_merge`, see `extend_run_merge`."""

        spec = MergeMethodSpec(
            name=METHOD,
            pretty_name="UpIT",
            reference_url="https://arxiv.org/abs/2410.01610",
            contract=InputContract(base=BasePolicy.REQUIRED),
        )

        def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Any:
            raise UpitError(
                "upit makes several experts of each tensor, so it cannot merge single tensors; "
                "use mergekit-yaml, mergekit.merge.run_merge or upit-merge run."
            )

    merge_methods.register(UpitMethod())


def extend_run_merge(merge: ModuleType) -> None:
    """Send `merge_method: upit` to our pipeline and everything else on as before."""
    _extend_configuration()
    original: Callable[..., None] = merge.run_merge

    signature = inspect.signature(original)

    @functools.wraps(original)
    def run_merge(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        values = call.arguments
        if values["merge_config"].merge_method != METHOD:
            return original(*args, **kwargs)
        return _run_upit(
            values["merge_config"], values["out_path"], values["options"], values["config_source"]
        )

    merge.run_merge = run_merge  # type: ignore[attr-defined]


def _extend_configuration() -> None:
    """Let mergekit's configuration carry a `router:` block, which it would silently drop.

    A `merge_method: upit` document is validated as our recipe first, so that every mistake is
    told in our words, before mergekit's own model sees it.
    """
    from mergekit.config import MergeConfiguration

    class UpitConfiguration(MergeConfiguration):
        router: dict[str, Any] | None = None

    original = MergeConfiguration.model_validate.__func__

    def model_validate(cls: type[Any], obj: Any, **kwargs: Any) -> Any:
        if (
            cls is MergeConfiguration
            and isinstance(obj, Mapping)
            and obj.get("merge_method") == METHOD
        ):
            check_yaml_size(obj, "the recipe")
            parse_recipe(_as_written(obj))
            return original(UpitConfiguration, obj, **kwargs)
        return original(cls, obj, **kwargs)

    MergeConfiguration.model_validate = classmethod(model_validate)


def _as_written(value: Any) -> Any:
    """Return a document as its author wrote it: mergekit-multi validates again what it has parsed.

    There, keys that were not set are None and model references are spelled out.
    """
    if isinstance(value, list):
        return [_as_written(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if "lora" in value and isinstance(value.get("model"), Mapping):
        from mergekit.common import ModelReference

        return str(ModelReference.model_validate(value))
    return {key: _as_written(item) for key, item in value.items() if item is not None}


def _run_upit(merge_config: Any, out_path: str, options: Any, config_source: str | None) -> None:
    from upit_merge.commands.run import run_recipe

    if config_source is None and not hasattr(merge_config, "router"):
        LOG.warning(
            "A MergeConfiguration made without model_validate drops the router: block; pass "
            "config_source to run_merge if the recipe has one."
        )
    # mergekit-multi gives no source: there, the configuration itself is the recipe.
    source = config_source or merge_config.to_yaml()
    run_recipe(parse_recipe_text(source), source, Path(out_path), run_options(options))


def run_options(options: Any, *, overwrite: bool = False) -> Any:
    """Return our `RunOptions` for a mergekit `MergeOptions`; say which options have no effect.

    Raises:
        UpitError: pickled output is asked for.
    """
    from upit_merge.commands.run import RunOptions
    from upit_merge.io.hub import OpenOptions

    if not options.safe_serialization:
        raise UpitError("upit writes safetensors only; leave out --no-safe-serialization.")
    defaults = type(options)()
    for name, reason in NO_EFFECT.items():
        if getattr(options, name, None) != getattr(defaults, name, None):
            LOG.warning("--%s has no effect on upit: %s.", name.replace("_", "-"), reason)
    return RunOptions(
        device=options.device or "cpu",
        multi_gpu=options.multi_gpu,
        max_shard_bytes=options.out_shard_size,
        open=OpenOptions(
            allow_pickle=options.lazy_unpickle,
            cache_dir=options.transformers_cache,
            trust_remote_code=options.trust_remote_code,
        ),
        seed=options.random_seed,
        copy_tokenizer=options.copy_tokenizer,
        write_card=options.write_model_card,
        overwrite=overwrite,
        quiet=options.quiet,
    )
