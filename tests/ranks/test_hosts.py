"""Two hosts made of two network namespaces, joined by torchrun's rendezvous over addresses of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from safecrit.cli.app import app
from safecrit.maskfile import Mask
from tests.ranks import world as worlds
from tests.ranks.launch import ROOT

pytestmark = pytest.mark.slow
HOSTS = {f"safecrit-{os.getpid()}-a": "10.213.7.1", f"safecrit-{os.getpid()}-b": "10.213.7.2"}


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip (iproute2)")
    (a, left), (b, right) = HOSTS.items()
    made = []
    try:
        for name in HOSTS:
            ip("netns", "add", name)
            made.append(name)
        ip("-n", a, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", b)
        for name, address in ((a, left), (b, right)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except OSError as error:
        for name in made:
            ip("netns", "del", name)
        pytest.skip(f"network namespaces are not allowed here ({error})")
    yield HOSTS
    for name in HOSTS:
        ip("netns", "del", name)


def on_all(hosts: dict[str, str], *command: object) -> list[tuple[int, str]]:
    """The same torchrun line on every host: exit codes and stderr."""
    first = next(iter(hosts.values()))
    place = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={first}:29441"]
    line = [sys.executable, "-m", "torch.distributed.run", *place, "-m", "safecrit", *map(str, command)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "eth0"}
    pipe, started = subprocess.PIPE, []
    for name, address in hosts.items():
        # Which host has the store cannot be told from a name that both share.
        own = [f"--local-addr={address}", f"--rdzv-conf=is_host={int(address == first)}"]
        local = [*line[:3], *own, *line[3:]]
        command_line = ["ip", "netns", "exec", name, *local]
        started.append(subprocess.Popen(command_line, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True))
    found = [(process.communicate(timeout=240)[1], process.returncode) for process in started]
    return [(code, err) for err, code in found]


def test_two_hosts_make_the_mask_of_one_process(hosts: dict[str, str], tmp_path: Path) -> None:
    world = worlds.make(tmp_path)
    app(world.score("dense", tmp_path / "1", "-q"), standalone_mode=False)
    app(["mask", str(tmp_path / "1"), "--top", "1%", "-o", str(tmp_path / "1.safetensors")], standalone_mode=False)
    for code, err in on_all(hosts, *world.score("dense", tmp_path / "2", "--parallel", "shard")):
        assert code == 0, err
    for scores, mask in (("1", "same"), ("2", "own")):
        more = ["--top", "1%", "-o", tmp_path / f"{mask}.safetensors"]
        for code, err in on_all(hosts, "mask", tmp_path / scores, *more):
            assert code == 0, err
    expected = (tmp_path / "1.safetensors").read_bytes()
    assert (tmp_path / "same.safetensors").read_bytes() == expected

    masks = [Mask.load(tmp_path / f"{name}.safetensors") for name in ("1", "own")]
    assert masks[0].iou(masks[1]) >= 0.999
