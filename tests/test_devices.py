"""What `qllama doctor` tells of links and of where a model would lie."""

import json

import pytest

from qllama.cli import main
from qllama.cli.devices import Link, link_rows, parse_topology
from qllama.cli.doctor import Device, findings

# As nvidia-smi 570 prints it, with the header underlined.
TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-31\t0\t\tN/A
GPU1\tNV18\t X \tSYS\tNODE\t0-31\t0\t\tN/A
GPU2\tSYS\tSYS\t X \tSYS\t32-63\t1\t\tN/A
NIC0\tPIX\tNODE\tSYS\t X

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
  NV#  = Connection traversing a bonded set of # NVLinks
"""


def test_links_between_gpus() -> None:
    links = parse_topology(TOPOLOGY)
    assert links == (
        Link(first="GPU0", second="GPU1", kind="NV18"),
        Link(first="GPU0", second="GPU2", kind="SYS"),
        Link(first="GPU1", second="GPU2", kind="SYS"),
    )
    assert link_rows(links) == [
        ["  link NV18", "NVLink: GPU0-GPU1"],
        ["  link SYS", "no NVLink: GPU0-GPU2, GPU1-GPU2"],
    ]
    assert parse_topology("No devices were found") == ()


def test_missing_nvlink_is_a_finding() -> None:
    gpu = Device(kind="NVIDIA H100", platform="gpu", compute_capability="9.0", memory=80 << 30)
    memory = {"XLA_PYTHON_CLIENT_ALLOCATOR": None}
    found = [f.problem for f in findings((gpu, gpu), "570", None, memory, parse_topology(TOPOLOGY))]
    assert any("no NVLink between GPU0-GPU2, GPU1-GPU2" in problem for problem in found)


@pytest.mark.parametrize(
    ("size", "problem"), [(2, None), (4, "groups of 128"), (16, "cannot be split")]
)
def test_a_plan(
    size: int, problem: str | None, tiny_llama3, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_llama3("ct_w4a16_g128"))
    assert main(["doctor", "--json", "--model", model, "-tp", str(size)]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    if problem is not None:
        assert problem in plan["problem"]
        return
    assert plan["problem"] is None
    # 4 layers, widened to float32 on a CPU; half of each weight on each of two devices.
    layer = 256 * (256 + 128 + 128 + 256) + 3 * 256 * 512
    assert plan["weights"] == (4 * layer + 2 * 768 * 256) * 4 // 2
    assert plan["cache_per_token"] == 4 * 2 * 64 * 4
    assert plan["tokens"] == (plan["free"] - plan["weights"]) // plan["cache_per_token"]
