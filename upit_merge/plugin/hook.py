"""Imported at every interpreter start: makes `merge_method: upit` known once mergekit is.

mergekit 0.1.5 has no plug-in discovery. This module waits on `sys.meta_path` until somebody
imports the two mergekit modules named below and then lets `plugin.method` extend them. It must
cost nothing, import nothing, and never raise; set UPIT_MERGE_DISABLE_PLUGIN=1 to switch it off.
"""

import sys

_EXTENDED = {
    "mergekit.merge_methods": "register_method",
    "mergekit.merge": "extend_run_merge",
}


class _MergekitFinder:
    """Finds nothing itself; has the modules above extended right after they are executed."""

    @staticmethod
    def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name not in _EXTENDED:
            return None
        for finder in sys.meta_path:
            if finder is _MergekitFinder or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    _extend_after_execution(spec, _EXTENDED[name])
                return spec
        return None


def _extend_after_execution(spec, function):  # type: ignore[no-untyped-def]
    execute = spec.loader.exec_module

    def execute_and_extend(module):  # type: ignore[no-untyped-def]
        execute(module)
        try:
            from upit_merge.plugin import method

            getattr(method, function)(module)
        except Exception as error:  # mergekit must go on working, whatever is wrong with us
            print(f"upit-merge could not extend mergekit: {error!r}", file=sys.stderr)

    spec.loader.exec_module = execute_and_extend


def install() -> None:
    """Start to wait for mergekit, once."""
    # `site`, which reads the .pth file that imports us, has imported os already.
    environ = getattr(sys.modules.get("os"), "environ", {})
    enabled = environ.get("UPIT_MERGE_DISABLE_PLUGIN", "0") in ("", "0")
    if enabled and _MergekitFinder not in sys.meta_path:
        sys.meta_path.insert(0, _MergekitFinder)


install()
