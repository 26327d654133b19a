"""Work whose result is a folder, and whose state lies beside it until all is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ClassVar, Protocol

from spikellm.conversion.journal import forget, is_journal, is_leftover, replaces
from spikellm.core import distributed
from spikellm.core.errors import RequestError, SpikeLLMError
from spikellm.core.files import remove_leftovers, require_folder_name, require_free, require_outside
from spikellm.core.lock import locked


class _Options(Protocol):
    @property
    def resume(self) -> bool: ...

    @property
    def force(self) -> bool: ...


class FolderWork:
    """One piece of work on a model that ends in a folder.

    Attributes:
        kind: of work, for messages.

    Args:
        model: folder or hub name.
        out: folder to write.
        options: whether to resume, and whether to overwrite.
    """

    kind: ClassVar[str]

    def __init__(self, model: str, out: Path, options: _Options) -> None:
        self.model, self.out = model, out.resolve()
        self._resume, self._force = options.resume, options.force
        self.overwrite = options.force

    @property
    def partial(self) -> Path:
        """The folder of what is finished, beside OUT."""
        return self.out.with_name(f"{self.out.name}.partial")

    def require_target(self, reads: Iterable[str]) -> None:
        """Refuse targets that could not be meant, before anything is touched."""
        if not self.out.name:
            raise RequestError(f"OUT is {self.out}; give a folder with a name")
        require_folder_name(self.out)
        if self.out == Path(self.model).resolve():
            raise RequestError(f"OUT is the model itself ({self.out}); choose another folder")
        require_outside(self.out, *reads)

    def clear_the_way(self) -> None:
        """Refuse what must not be touched, clear away what is to be forgotten."""
        resume, force = self._resume, self._force
        if resume and force:
            raise RequestError(
                f"--resume goes on with an interrupted {self.kind} and --force forgets it; give one"
                " of them"
            )
        interrupted = is_journal(self.partial)
        if interrupted and not (resume or force):
            raise RequestError(
                f"{self.partial} holds an interrupted {self.kind}; go on with --resume, or start"
                " afresh with --force"
            )
        if not interrupted and self.partial.exists() and not is_leftover(self.partial):
            raise RequestError(
                f"{self.partial} is in the way: finished blocks are kept there; move it or choose"
                " another OUT"
            )
        self.overwrite = force or (resume and replaces(self.partial))
        require_free(self.out, overwrite=self.overwrite)
        distributed.barrier()  # all have looked
        if distributed.is_main():
            if not (interrupted and resume):
                forget(self.partial)
            remove_leftovers(self.out)
        distributed.barrier()


@contextmanager
def locked_for_all(out: Path) -> Iterator[None]:
    """The lock of a folder, taken by the first rank for all of them.

    Raises:
        RequestError: another process has it; every rank says so.
    """
    refusal: SpikeLLMError | None = None
    with ExitStack() as held:
        if distributed.is_main():
            try:
                held.enter_context(locked(out))
            except SpikeLLMError as error:
                refusal = error
        if distributed.sum_scalar(float(refusal is not None)):
            raise refusal or RequestError(f"{out} cannot be written, as rank 0 says")
        yield
