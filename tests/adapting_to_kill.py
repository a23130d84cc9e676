"""An adaptation that is killed over and over, and once left alone. A program of its own: `adapting_to_kill.py FOLDER
KILLS SEED`."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # as optimisers do when they are made: here once, not in each of the processes
from adapting_data import clouds
from forks import start

from fastda.adapting import adapt, load_model
from fastda.adapting.folder import RESULTS


def run(out: Path) -> None:
    torch.set_num_threads(1)
    source, labels, target, target_labels = map(torch.from_numpy, clouds(90))
    adapt(source, labels, target, measured_labels=target_labels, epochs=15, batch_size=15, out=out)


def ends(child: int) -> None:
    _, status = os.waitpid(child, 0)
    assert status == 0, "a run failed"


def killed(child: int, after: float) -> bool:
    """Whether it was killed before it ended by itself."""
    time.sleep(after)
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        assert status == 0, "a run failed"
        return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def main(folder: Path, kills: int, seed: int) -> None:
    alone, out = folder / "left alone", folder / "killed"
    begin = time.monotonic()
    ends(start(run, alone))
    whole = time.monotonic() - begin
    moments, count, resumed, same = random.Random(seed), 0, 0, []
    while count < kills:
        begun = (out / "pretraining.pt").exists()
        if killed(start(run, out), moments.uniform(0, 0.9 * whole)):
            count, resumed = count + 1, resumed + (begun or (out / "pretraining.pt").exists())
        else:  # finished between two kills: again from the beginning
            same.append(equal(alone, out))
            shutil.rmtree(out)
    ends(start(run, out))
    same.append(equal(alone, out))
    print(json.dumps({"kills": count, "resumed": resumed, "finished": len(same), "same": all(same)}))


def equal(alone: Path, out: Path) -> bool:
    """Whether all that was written is to the bit what the run that was left alone wrote, and nothing else is there."""
    texts = [name for name in RESULTS if name != "model.safetensors"]
    files = [(alone / name).read_bytes() == (out / name).read_bytes() for name in texts]
    one, other = (load_model(path) for path in (alone, out))
    states = [{**m.feature_extractor.state_dict(), **m.label_predictor.state_dict()} for m in (one, other)]
    weights = states[0].keys() == states[1].keys() and all(map(torch.equal, states[0].values(), states[1].values()))
    return all(files) and weights and {p.name for p in alone.iterdir()} == {p.name for p in out.iterdir()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
