"""Many processes, or little memory: one step of training, divided.

    torchrun --nproc_per_node 2 train.py ddpm        two processes; on several machines likewise
    python train.py ddpm --accumulate 4              one, that deals with a quarter batch at a time

Every process holds the whole model and draws the times and the noise of the whole batch, as a
single one would; it then deals with its `own` pictures only, and DistributedDataParallel takes the
mean of the gradients. So a run is the same function of its seed however many processes share it, up
to rounding, and may go on with more or fewer of them.

Without torchrun there is one process, and all that these functions return is what they were given.
This imports nothing of ours.

Left out: models too large for one device.
"""
import atexit
import contextlib
import datetime
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint


def start():
    """Join the others, if torchrun has started this process: it sets RANK and the like."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    if torch.cuda.is_available():   # from here on, "cuda" is a device of its own for each process
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Gloo is for what CPUs tell each other, on machines with GPUs too. A day: the first process
    # may be rendering a data set that all others wait for.
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backends, timeout=datetime.timedelta(days=1))
    atexit.register(dist.destroy_process_group)
    if rank():
        sys.stdout = open(os.devnull, "w")


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """The number of this process, from 0. The first one alone writes and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def one_at_first():
    """A context that the first process of each machine goes through before all others."""
    others = int(os.environ.get("LOCAL_RANK", 0)) > 0
    if others:
        agreed(False)
    yield
    if not others:
        agreed(False)


def agreed(*flags):
    """-> for each of these booleans, whether it is true in any process: the same list in all."""
    flags = torch.tensor(flags, dtype=torch.int32)
    if dist.is_initialized():
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.bool().tolist()


def mean(x):
    """A tensor -> its mean over all processes."""
    if dist.is_initialized():
        x = x / processes()   # not every backend knows ReduceOp.AVG
        dist.all_reduce(x)
    return x


def with_mean_gradients(module):
    """-> the same module, whose backward() leaves in each process the mean of all gradients."""
    return DistributedDataParallel(module) if dist.is_initialized() else module


def own(batch):
    """What is there for each picture of a batch, (B, ...) -> for those of this process,
    (B / processes, ...)."""
    share = len(batch) // processes()
    return batch[rank() * share:][:share]


def whole(own_features):
    """The inverse of own: (B / processes, E) -> (B, E), in every process.

    Only a process's own features lead back to its parameters. From all B, every process is to
    compute the same loss; so it has the right gradient with respect to its own ones, less than all
    of which would be left of it in with_mean_gradients: hence times the number of processes.
    """
    if not dist.is_initialized():
        return own_features
    everyones = [torch.empty_like(own_features) for _ in range(processes())]
    dist.all_gather(everyones, own_features.detach().contiguous())
    moving = own_features - own_features.detach()   # zero, with a derivative
    everyones[rank()] = own_features.detach() + processes() * moving
    return torch.cat(everyones)


def in_pieces(function, pieces, *tensors):
    """function(*tensors), (B, ...) each -> (B, ...), a part of the batch at a time.

    The gradient is that of the whole batch, whatever loss follows. Of each piece its output alone
    is kept, and all else that its gradient needs is computed again when the gradient is wanted:
    memory for one piece, at the cost of a second forward pass (Chen et al. 2016, "Training Deep
    Nets with Sublinear Memory Cost", arXiv 1604.06174).
    """
    if pieces == 1:
        return function(*tensors)
    parts = zip(*(tensor.chunk(pieces) for tensor in tensors))
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])
