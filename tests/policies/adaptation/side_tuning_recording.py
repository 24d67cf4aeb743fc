"""What the authors' side-tuning computes: tests/data/side_tuning.npz, and the weights it was recorded with.

Recorded with torch 2.13 from github.com/jozhang97/side-tuning, commit dea3456: merge_operators.py, the
GenericSidetuneNetwork and TransferConv3 of sidetune_architecture.py, the LifelongSidetuneNetwork of
lifelong_framework.py and the BoostedNetwork of models_additional.py, all of tlkit/models, imported with empty
modules in place of their other imports. Base and side networks were one convolution of 3x3 with stride 2 from
3 to 8 channels. Mended: F.ReLU, which does not exist, is F.relu in MLPHidden; BoostedNetwork no longer fails
on a decoder or transfer class that is left out. Weights and statistics were set by ``authors_value`` below;
in "blend", the weight of the side's convolution was negated and the logit of alpha 1.39.
"""

import zlib
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parents[2] / "data" / "side_tuning.npz"


def recording():
    with np.load(DATA) as data:
        return {name: torch.from_numpy(data[name]) for name in data.files}


def authors_value(name, shape):
    """The weight that the authors' module had under this name."""
    drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    drawn = np.abs(drawn) + 0.5 if name.endswith("running_var") else 0.4 * drawn
    return torch.as_tensor(np.asarray(drawn), dtype=torch.float32)


def fill(module, authors_name):
    """Gives a module the values of the authors' one; ``authors_name`` turns its names into theirs."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                value.copy_(authors_value(authors_name(name), value.shape))
