"""The lock: constraints.txt pins every package that `make` installs, and the environment follows it."""

import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import clients

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "constraints.txt").read_text()
CLIENTS = (ROOT / "constraints-clients.txt").read_text()
RAY = (ROOT / "constraints-ray.txt").read_text()
BUILD_TOOLS = ("pip", "setuptools")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

Pins = dict[str, Requirement]


def pins(text: str, **environment: str) -> Pins:
    """What the lock's ``text`` pins on this machine, or where the markers of ``environment`` hold, by name."""
    found: Pins = {}
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{requirement} and {found[name]} both hold for {environment or 'this machine'}"
            found[name] = requirement
    return found


def required(name: str, extras: tuple[str, ...] = ()) -> Iterator[tuple[Requirement, str]]:
    """The requirements of an installed distribution that hold here, each with the name of who asks for it."""
    for line in metadata.requires(name) or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement, name


def complaints(locked: Pins, *extras: str) -> list[str]:
    """What of all that ``fastattn[extras]`` and the build tools need is not in the lock, or not as the lock says."""
    waiting = [(Requirement(tool), "make") for tool in BUILD_TOOLS] + list(required("fastattn", extras))
    met: set[tuple[str, tuple[str, ...]]] = set()
    wrong = []
    while waiting:
        requirement, by = waiting.pop()
        name, wanted = canonicalize_name(requirement.name), tuple(sorted(requirement.extras))
        if (name, wanted) in met:
            continue
        met.add((name, wanted))
        waiting += required(name, wanted)
        if name == "fastattn":
            continue
        if name not in locked:
            wrong.append(f"{name}, which {by} requires, has no line in constraints.txt: run `make lock`")
        elif not locked[name].specifier.contains(version := metadata.version(name), prereleases=True):
            wrong.append(f"{name} {version} is installed, but constraints.txt says {locked[name]}")
    return wrong


@pytest.fixture
def made_by_make():
    """Elsewhere (a GPU machine's own torch, say) nothing says that versions are the lock's."""
    if not (Path(sys.prefix) / ".installed").exists():
        pytest.skip(f"{sys.prefix} was not made by `make`: it need not follow constraints.txt")


def test_everything_that_make_installs_is_locked(made_by_make):
    """Unpinned, the type checker came out anew and `make test` was red on every fresh machine, and only there."""
    assert complaints(pins(LOCK), "dev") == []


def test_a_dependency_that_is_not_locked_is_named(made_by_make):
    """pluggy is nobody's but pytest's; a lock without it, or with another version, has to be complained of."""
    locked = pins(LOCK)
    other = Requirement("pluggy==0.0.1")
    assert any("pluggy 1" in line and str(other) in line for line in complaints({**locked, "pluggy": other}, "dev"))
    del locked["pluggy"]
    assert complaints(locked, "dev") == [
        "pluggy, which pytest requires, has no line in constraints.txt: run `make lock`"
    ]


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_pins_one_version_for_each_python(python):
    """On Linux; ``pins`` fails where two lines hold at once. What the extras name themselves is there everywhere."""
    on_linux = {"platform_system": "Linux", "sys_platform": "linux", "platform_machine": "x86_64"}
    locked = pins(LOCK, **on_linux, python_version=python, python_full_version=f"{python}.0")
    assert {"torch", "triton", "numpy", "pytest", "ruff", "pyrefly", "setuptools", "pip"} <= set(locked)
    for requirement in locked.values():
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], requirement


@pytest.mark.parametrize("python", [python for python in PYTHONS if python != "3.10"])
def test_clients_have_the_versions_of_the_lock(python):
    """`make clients` has packages of its own, and of what `make test` installs, torch above all, the same versions."""
    on_linux = {"platform_system": "Linux", "sys_platform": "linux", "platform_machine": "x86_64"}
    where = {**on_linux, "python_version": python, "python_full_version": f"{python}.0"}
    locked, of_clients = pins(LOCK, **where), pins(CLIENTS, **where)
    packages = {canonicalize_name(client.package) for client in clients.CLIENTS}
    assert packages | {"torch", "triton", "pytest", "pip", "setuptools"} <= of_clients.keys()
    assert {name: of_clients[name].specifier for name in locked.keys() & of_clients.keys()} == {
        name: locked[name].specifier for name in locked.keys() & of_clients.keys()
    }


@pytest.mark.parametrize("python", PYTHONS)
def test_ray_has_the_versions_of_the_lock(python):
    """`make ray`, too."""
    on_linux = {"platform_system": "Linux", "sys_platform": "linux", "platform_machine": "x86_64"}
    where = {**on_linux, "python_version": python, "python_full_version": f"{python}.0"}
    locked, of_ray = pins(LOCK, **where), pins(RAY, **where)
    assert {"ray", "torch", "triton", "pytest", "pip", "setuptools"} <= of_ray.keys()
    assert {name: of_ray[name].specifier for name in locked.keys() & of_ray.keys()} == {
        name: locked[name].specifier for name in locked.keys() & of_ray.keys()
    }


@pytest.mark.parametrize(
    "lock", [LOCK, CLIENTS, RAY], ids=["constraints.txt", "constraints-clients.txt", "constraints-ray.txt"]
)
def test_lock_names_no_place(lock):
    """A machine takes its packages from where it likes (a CPU build of torch, a mirror): no URL, no hash, no option."""
    for line in lock.splitlines():
        assert "://" not in line, line
        assert " @ " not in line, line
        assert not line.lstrip().startswith("-"), line
        assert "--hash" not in line, line
