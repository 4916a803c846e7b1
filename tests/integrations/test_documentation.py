"""docs/optimizer.md: every code block is run, and what it says of existing loops is counted and compared."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

DOCUMENT = Path(__file__).parents[2] / "docs" / "optimizer.md"


class Block(NamedTuple):
    """A fenced block: its language, the words after it, its line in the document and its lines."""

    language: str
    title: str
    number: int
    lines: list[str]

    @property
    def code(self) -> str:
        """What is to be run; of a difference, the version with ASGA."""
        return self.version("+") if self.language == "diff" else "\n".join(self.lines)

    @property
    def changed(self) -> int:
        """Of a difference, the lines taken out and put in; blank ones are no work."""
        return sum(line[:1] in ("+", "-") and bool(line[1:].strip()) for line in self.lines)

    def version(self, sign: str) -> str:
        return "\n".join(line[1:] for line in self.lines if line[:1] in (sign, " ", ""))


def blocks() -> list[Block]:
    found: list[Block] = []
    opened = False
    for number, line in enumerate(DOCUMENT.read_text().splitlines(), 1):
        if line.startswith("```"):
            if not opened:
                language, _, title = line[3:].partition(" ")
                found.append(Block(language, title, number, []))
            opened = not opened
        elif opened:
            found[-1].lines.append(line)
    return found


BLOCKS = blocks()
SETUP = next(block for block in BLOCKS if block.title == "setup")
LOOPS = [pytest.param(block, id=block.title) for block in BLOCKS if block.language == "diff"]
SINGLE = [block for block in BLOCKS if block.language == "python" and block.title == ""]
SEVERAL = [block for block in BLOCKS if block.title == "ranks=2"]

# Two processes, forked so that torch is imported once; every block in a fresh namespace, started as torchrun would.
# Nothing of a block is freed before the processes end, at once: who drops the last reference to a ProcessGroupGloo
# waits for its thread with the GIL held, and that thread may need the GIL to free a tensor (seen with torch 2.13).
ON_TWO_RANKS = """
import os, torch, torch.distributed as dist, torch.multiprocessing as mp
import asga.optim, torch.distributed.checkpoint, torch.distributed.fsdp

SETUP, BLOCKS = {setup!r}, {blocks!r}

def work(rank, ports):
    ports = ports.get()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")
    kept = []
    for (number, code), port in zip(BLOCKS.items(), ports):
        os.environ["MASTER_PORT"] = str(port)
        namespace = {{"__name__": "documentation"}}
        exec(SETUP, namespace)
        exec(code, namespace)
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in namespace["model"].parameters()]
        flat = torch.cat([p.detach().reshape(-1) for p in whole])
        both = [torch.empty_like(flat) for _ in range(2)]
        dist.all_gather(both, flat)
        report = namespace["optimizer"].diagnostics()
        if rank == 0:
            print(number, torch.equal(*both), int(report["steps"]), int(report["skipped"]), flush=True)
        kept += namespace, dist.group.WORLD
        dist.destroy_process_group()
    os._exit(0)

# The stores have threads, and a process with threads had better not be forked.
queue = mp.get_context("fork").SimpleQueue()
processes = mp.start_processes(work, (queue,), nprocs=2, start_method="fork", join=False)
stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in BLOCKS]
for _ in range(2):
    queue.put([store.port for store in stores])
while not processes.join():
    pass
"""


def run(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Run the setup and then `code` in a fresh namespace and a folder of its own; returns the namespace."""
    for name in ("lightning", "accelerate"):
        if re.search(rf"^(import|from) {name}\b", code, re.MULTILINE):
            pytest.importorskip(name)
    monkeypatch.chdir(folder)
    namespace: dict[str, object] = {"__name__": "documentation"}
    with torch.random.fork_rng(devices=[]):
        exec(compile(SETUP.code, "setup", "exec"), namespace)
        exec(compile(code, str(DOCUMENT), "exec"), namespace)
    return namespace


def bits(namespace: dict[str, object]) -> list[bytes]:
    """Weights and buffers of the model that a block has trained."""
    return [value.detach().cpu().numpy().tobytes() for value in namespace["model"].state_dict().values()]


@pytest.mark.parametrize("block", LOOPS)
class TestExistingLoops:
    def test_fewer_than_15_lines_change(self, block):
        assert 0 < block.changed < 15

    def test_every_kind_of_loop_makes_the_same_steps(self, block, tmp_path, monkeypatch):
        plain = LOOPS[0].values[0]
        before = bits(run(block.version("-"), tmp_path, monkeypatch))
        after = bits(run(block.version("+"), tmp_path, monkeypatch))
        assert before == bits(run(plain.version("-"), tmp_path, monkeypatch))
        assert after == bits(run(plain.version("+"), tmp_path, monkeypatch))
        assert after != before


@pytest.mark.parametrize("block", [pytest.param(block, id=f"line {block.number}") for block in SINGLE])
def test_block_trains(block, tmp_path, monkeypatch):
    namespace = run(block.code, tmp_path, monkeypatch)
    report = namespace["optimizer"].diagnostics()
    assert report["skipped"] == 0
    assert all(torch.isfinite(p).all() for p in namespace["model"].parameters())
    if "second_step" in block.code or ".step(" in block.code:
        assert report["steps"] == (2 if "micro_batches" in block.code else 4)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_blocks_train_the_same_weights_on_two_ranks(run_python):
    script = ON_TWO_RANKS.format(setup=SETUP.code, blocks={block.number: block.code for block in SEVERAL})
    expected = [f"{block.number} True {4 if 'second_step' in block.code else 0} 0" for block in SEVERAL]
    # Interfaces of containers are not always reachable by name.
    assert run_python(script, GLOO_SOCKET_IFNAME="lo").splitlines() == expected


# Follows the block on `torch.distributed.checkpoint`: what it defines, used.
RESUMED = """

def train(steps):
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(steps):
        x, y = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)
        for take in (optimizer.first_step, optimizer.second_step):
            loss = loss_fn(model(x), y)
            loss.backward()
            take(loss)

def bits():
    states = [sorted(optimizer.state[p].items()) for p in model.parameters()]
    moments = [v.to_local() if hasattr(v, "to_local") else v for state in states for _, v in state]
    assert len(moments) == 3 * len(states)
    # Not the running statistics of BatchNorm: each process has its own, of which one is saved.
    tensors = [*(p.detach().to_local() for p in model.parameters()), *moments, optimizer.rho]
    return b"".join(t.numpy().tobytes() for t in tensors), optimizer.diagnostics()["steps"]

train(3)
save(FOLDER)
train(3)
whole, report = bits(), optimizer.diagnostics()

model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
fully_shard(model, mesh=torch.distributed.init_device_mesh(device, (2,)))
optimizer = ASGA(model.parameters(), torch.optim.AdamW, lr=123.0, model=model)
resume(FOLDER)
train(3)
same = torch.tensor(float(bits() == whole and optimizer.diagnostics() == report))
assert optimizer.param_groups[0]["lr"] == 1e-3
dist.all_reduce(same, dist.ReduceOp.MIN)
if dist.get_rank() == 0:
    print("same bits" if same.item() == 1.0 else "other bits")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_a_distributed_checkpoint_resumes_bit_for_bit(run_python, tmp_path):
    (block,) = [block for block in SEVERAL if "dcp.save" in block.code]
    code = f"FOLDER = {str(tmp_path)!r}\n{block.code}{RESUMED}"
    printed = run_python(ON_TWO_RANKS.format(setup=SETUP.code, blocks={1: code}), GLOO_SOCKET_IFNAME="lo")
    assert printed.splitlines() == ["same bits", "1 True 6 0"]


def test_no_block_is_left_out():
    assert len(BLOCKS) == 1 + len(LOOPS) + len(SINGLE) + len(SEVERAL)
    assert len(LOOPS) == 5
    assert SINGLE
    assert SEVERAL


def test_every_link_to_a_section_has_one():
    text = DOCUMENT.read_text()
    sections = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", text, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= sections
