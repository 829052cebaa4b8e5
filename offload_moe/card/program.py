"""The kernels of one model: lines of definitions, compiled together."""

from collections.abc import Callable, Hashable

from offload_moe.native.session import Module, Session

Compile = Callable[[str], bytes]  # the text of a program -> its image
INCLUDES = ("kernels.cuh", "attention.cuh", "residency.cuh")


class Program:
    """Collects the kernels that are needed, each once."""

    def __init__(self) -> None:
        self._names: dict[tuple[Hashable, ...], str] = {}
        self._module: Module | None = None
        self._functions: dict[str, int] = {}

    def kernel(self, kind: str, *sizes: int | str) -> str:
        """The name of the kernel ``OM_DEFINE_<kind>(name, *sizes)``."""
        return self._names.setdefault((kind, *sizes), f"om_{kind.lower()}_{len(self._names)}")

    @property
    def text(self) -> str:
        lines = [f'#include "{name}"' for name in INCLUDES]
        lines += [
            f"OM_DEFINE_{kind}({', '.join([name, *map(str, sizes)])})" for (kind, *sizes), name in self._names.items()
        ]
        return "\n".join([*lines, ""])

    def load(self, session: Session, compile_text: Compile) -> None:
        """Compile and load it. Raises: DevicePassUnavailable, TransferError."""
        self._module = session.load(compile_text(self.text))
        self._functions.clear()

    def close(self) -> None:
        """Unload it; its graphs are freed."""
        if self._module is not None:
            self._module.close()

    def function(self, name: str) -> int:
        """The handle of a kernel of a loaded program."""
        assert self._module is not None
        if name not in self._functions:
            self._functions[name] = self._module.function(name)
        return self._functions[name]
