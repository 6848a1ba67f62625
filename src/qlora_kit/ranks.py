"""Who this process is among several that train together, and what one does for all.

The launcher says it in the environment: torchrun, ``accelerate launch`` and
``torch.distributed.run`` in ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``, Slurm's ``srun`` in its
own variables. Everything here is free in a process that is alone.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

from qlora_kit.errors import ConfigError, TrainingError

__all__ = [
    "Node", "Place", "any_true", "choose_card", "find_place", "is_main", "join", "join_node",
    "leave", "others_wait", "share", "sum_up", "wait_for_all", "was_told",
]  # fmt: skip

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

#: A rank may wait for another one's export or tokenizing; the launcher ends the ranks of one that
#: died, and its closed connection wakes whoever waits for it.
_PATIENCE: Final = timedelta(hours=24)
#: Seconds that a rank waits for others before it says so.
_UNTIL_SAID: Final = 10.0
_TOLD: Final = "Raised on the main rank."
_TORCHRUN: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# SLURM_NTASKS is also set in a batch script, which is one process; this one only under srun.
_SLURM_TASKS: Final = "SLURM_STEP_NUM_TASKS"


class Place(NamedTuple):
    """A process's place in its group: ``world`` processes, of which this is the ``rank``-th."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0


class Node(NamedTuple):
    """The ranks of one machine, which are near each other.

    Attributes:
        members: Their numbers, in order.
        position: Which of them this process is.
        group: Over which they talk, with or without their cards.
    """

    members: tuple[int, ...]
    position: int
    group: Any

    def find_most(self, mine: int) -> int:
        """The largest number that one of them says. Each must ask; no card is waited for."""
        import torch
        from torch import distributed

        number = torch.tensor(mine)
        with _naming_the_gone():
            distributed.all_reduce(number, distributed.ReduceOp.MAX, group=self.group)
        return int(number)

    @contextlib.contextmanager
    def naming_missing(self, what: str) -> Iterator[None]:
        """Say which of them have not come to what all of them must do, while this one waits there.

        Args:
            what: What it is, at the beginning of a sentence.
        """
        from torch.distributed import distributed_c10d

        store = distributed_c10d._get_default_store()
        _Group.calls[what] += 1
        key = f"qlora_kit/{what}/{_Group.calls[what]}"
        mine = self.members[self.position]
        store.set(f"{key}/{mine}", b"here")

        def say() -> None:
            missing = [rank for rank in self.members if not store.check([f"{key}/{rank}"])]
            if missing:
                logger.warning(
                    "%s takes every rank of this machine. Rank %d waits, and these have not come "
                    "to it: %s. Let all of them make the same call.",
                    what, mine, ", ".join(map(str, missing)),
                )  # fmt: skip

        timer = threading.Timer(_UNTIL_SAID, say)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


class _Group:
    """What :func:`join` made: the connection over which ranks talk without their cards."""

    control: Any = None
    node: Node | None = None
    #: How many calls of :func:`share` the main rank is working for, while the others wait.
    sharing: int = 0
    calls: ClassVar[Counter[str]] = Counter()


def find_place() -> Place:
    """This process's place, as its launcher says; alone where there is none.

    Raises:
        ConfigError: When the launcher's variables are not whole numbers.
    """
    environment = os.environ
    names = _TORCHRUN
    if any(name not in environment for name in names):
        names = ("SLURM_PROCID", _SLURM_TASKS, "SLURM_LOCALID")
    if any(name not in environment for name in names):
        return Place()
    try:
        rank, world, local_rank = (int(environment[name]) for name in names)
    except ValueError as error:
        said = ", ".join(f"{name}={environment[name]!r}" for name in names)
        raise ConfigError(f"The launcher's {said} are not whole numbers.") from error
    return Place(rank, world, local_rank)


def is_main() -> bool:
    """Whether this process writes the files and speaks for all."""
    return find_place().rank == 0


def choose_card(count: int, current: int) -> int:
    """The number of the one card that this process computes on.

    Args:
        count: Cards that this process sees.
        current: The device library's current card.

    Raises:
        ConfigError: When there are more processes on this machine than cards.
    """
    place = find_place()
    if place.world == 1:
        return current
    # Slurm and containers may show each process its own card only.
    if place.local_rank >= count > 1:
        raise ConfigError(
            f"Process {place.local_rank} of this machine has no card: it has {count}, numbered "
            f"from 0. Start {count} processes per machine."
        )
    return place.local_rank % count


def join() -> Place:
    """Meet the other processes; once, and only where there are others.

    Non-main ranks log warnings and errors only from then on, unless the program has given the
    logger ``qlora_kit`` a level.
    """
    place = find_place()
    if place.world == 1 or _Group.control is not None:
        return place
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        _tell_torch(place)
        # accelerate looks for these very back ends afterwards, and takes what is there.
        patience = timedelta(minutes=30)
        distributed.init_process_group(
            _choose_backend(torch), timeout=patience, **_find_store(distributed, patience)
        )
        atexit.register(leave)
    _Group.control = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    package = logging.getLogger("qlora_kit")
    if place.rank == 0:
        logger.info("%d processes train together, each on one card.", place.world)
    elif package.level == logging.NOTSET:
        package.setLevel(logging.WARNING)
    return place


def join_node() -> Node:
    """Meet the processes of this machine. Every rank must ask.

    Raises:
        TrainingError: When another rank is gone.
    """
    place = join()
    if place.world == 1:
        return Node((0,), 0, None)
    if _Group.node is None:
        import torch
        from torch import distributed

        # Where a launcher numbers no machines, ranks lie on them one after the other.
        names = (os.environ.get("GROUP_RANK"), os.environ.get("SLURM_NODEID"))
        machine = next((n for n in names if n is not None), str(place.rank - place.local_rank))
        machines: list[str] = [""] * place.world
        # Whoever joined the group first may have wanted cards only.
        backend = _choose_backend(torch)
        with _naming_the_gone():
            distributed.all_gather_object(machines, machine, group=_Group.control)
            for name in dict.fromkeys(machines):
                members = tuple(rank for rank, its in enumerate(machines) if its == name)
                group = distributed.new_group(members, backend=backend)
                if place.rank in members:
                    _Group.node = Node(members, members.index(place.rank), group)
    assert _Group.node is not None
    return _Group.node


def leave() -> None:
    """Part from the others, whose waiting for this process ends with an error."""
    from torch import distributed

    _Group.control = _Group.node = None
    if distributed.is_initialized():
        distributed.destroy_process_group()


def wait_for_all() -> None:
    """Return when every rank has come this far."""
    any_true(False)


def any_true(mine: bool) -> bool:
    """Whether any rank says so. Every rank must ask; no card is waited for."""
    return bool(sum_up([float(mine)])[0])


def sum_up(mine: Sequence[float]) -> list[float]:
    """Sums over ranks, in float64. Every rank must ask, with equally many numbers.

    Raises:
        TrainingError: When another rank is gone.
    """
    if join().world == 1:
        return list(mine)
    import torch
    from torch import distributed

    numbers = torch.tensor(list(mine), dtype=torch.float64)
    with _naming_the_gone():
        distributed.all_reduce(numbers, group=_Group.control)
    return [float(number) for number in numbers]


@contextlib.contextmanager
def _naming_the_gone() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TrainingError(
            "Another rank has stopped, so this one cannot go on; its own message says why."
        ) from error


def share(name: str, make: Callable[[], Value]) -> Value:
    """What ``make`` returns on the main rank, or the exception that it raises there.

    The main rank waits for nobody, so that a script in which it alone comes here goes on.

    Args:
        name: Says what it is; calls of one name are told apart by their order.
        make: Called on the main rank only. Its value must be picklable.
    """
    place = join()
    if place.world == 1:
        return make()
    from torch.distributed import distributed_c10d

    store = distributed_c10d._get_default_store()
    _Group.calls[name] += 1
    key = f"qlora_kit/{name}/{_Group.calls[name]}"
    if place.rank == 0:
        _Group.sharing += 1
        try:
            value = make()
        except BaseException as error:
            store.set(key, _pickle(error))
            raise
        finally:
            _Group.sharing -= 1
        store.set(key, _pickle(value))
        return value
    answer = pickle.loads(_fetch(store, key))  # noqa: S301 - from this run's own main rank
    if isinstance(answer, BaseException):
        answer.add_note(_TOLD)
        raise answer
    result: Value = answer
    return result


def others_wait() -> bool:
    """Whether this is the main rank at work for all, so that no other can help it."""
    return _Group.sharing > 0


def was_told(error: BaseException) -> bool:
    """Whether an error is the main rank's, which that rank reports itself."""
    return _TOLD in getattr(error, "__notes__", ())


def _fetch(store: Any, key: str) -> bytes:
    started = time.monotonic()
    # Short waits, so that Ctrl-C is heard between them.
    for _ in itertools.count():
        try:
            store.wait([key], timedelta(seconds=2))
            return bytes(store.get(key))
        except RuntimeError as error:
            if "imeout" not in str(error) and "timed out" not in str(error):
                raise TrainingError(
                    "The main rank has stopped before it had this rank's result ready; its own "
                    "message says why."
                ) from error
            if time.monotonic() - started > _PATIENCE.total_seconds():
                raise
    raise AssertionError


def _pickle(value: object) -> bytes:
    try:
        data = pickle.dumps(value)
        # Errors with arguments of their own can be pickled, and not be made again.
        pickle.loads(data)  # noqa: S301
    except Exception as error:  # noqa: BLE001 - whatever a stranger's object does
        if isinstance(value, BaseException):
            return pickle.dumps(TrainingError(f"On the main rank: {type(value).__name__}: {value}"))
        return pickle.dumps(
            TrainingError(f"What the main rank made cannot be sent to the others: {error}")
        )
    return data


def _tell_torch(place: Place) -> None:
    """Say under srun what torchrun says: torch and accelerate read nothing else.

    The one place where this library writes its process's environment.
    """
    if "RANK" in os.environ:
        return
    said = dict(zip(_TORCHRUN, map(str, (place.rank, place.world, place.local_rank)), strict=True))
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", "localhost"))
    said["MASTER_ADDR"] = _first_node(nodes)
    # Jobs on one machine get ports of their own.
    said["MASTER_PORT"] = str(20_000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20_000)
    for name, value in said.items():
        os.environ.setdefault(name, value)


def _find_store(distributed: Any, patience: timedelta) -> dict[str, Any]:
    """Where to meet, when torchrun has started the processes of this machine once more.

    It keeps its store, with the addresses of those that died in it. On several machines the count
    is not the same on all of them, and starts over only with torchrun itself.
    """
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if start == "0" or os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        return {}
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(iter(rendezvous("env://", timeout=patience)))
    mine = distributed.PrefixStore(f"qlora_kit/start-{start}", store)
    return {"store": mine, "rank": rank, "world_size": world}


def _first_node(nodes: str) -> str:
    """``node`` of ``node``, ``node,other``, ``node[3-7,9]``: ``node3`` in the last case."""
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return head.partition(",")[0]
    return head + rest.replace("]", ",").replace("-", ",").partition(",")[0]


def _choose_backend(torch: Any) -> str:
    if torch.cuda.is_available():
        return "cpu:gloo,cuda:nccl"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "cpu:gloo,xpu:xccl"
    return "gloo"
