"""Many processes, or little memory: one step of training, divided.

    torchrun --nproc_per_node 2 train.py ddpm        two processes; on several machines likewise
    python train.py ddpm --accumulate 4              one, that deals with a quarter batch at a time

Every process holds the whole model and draws the times and the noise of the whole batch, as a
single one would; it then deals with its `own` pictures only, and DistributedDataParallel takes the
mean of the gradients. So a run is the same function of its seed however many processes share it, up
to rounding (and to dropout, where there is any), and may go on with more or fewer of them.

Without torchrun there is one process, and all that these functions return is what they were given.
This imports nothing of ours.

Left out: models too large for one device.
"""
import atexit
import contextlib
import datetime
import functools
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint


def start():
    """Join the others, if torchrun has started this process: it sets these variables."""
    if started() or not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
        return
    # Gloo is for what CPUs tell each other, on machines with GPUs too. A day: the first process
    # may be rendering a data set that all others wait for.
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo",
                            timeout=datetime.timedelta(days=1))
    atexit.register(dist.destroy_process_group)
    if rank():
        sys.stdout = open(os.devnull, "w")


def started():
    return dist.is_available() and dist.is_initialized()


def processes():
    return dist.get_world_size() if started() else 1


def rank():
    """The number of this process, from 0. The first one alone writes, and speaks of anything but
    errors."""
    return dist.get_rank() if started() else 0


def local_rank():
    """Its number among those of this machine, from 0."""
    return int(os.environ["LOCAL_RANK"]) if started() else 0


@contextlib.contextmanager
def one_at_first():
    """A context that the first process of each machine goes through before all others."""
    if local_rank():
        in_any(False)   # waits until all processes have asked
    yield
    if not local_rank():
        in_any(False)


def in_any(*flags):
    """-> for each of these booleans, whether it is true in any process: the same list in all."""
    flags = torch.tensor(flags, dtype=torch.int32)
    if started():
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.bool().tolist()


def from_first(make):
    """make() in the first process -> what it returned, in every process."""
    result = [make() if rank() == 0 else None]
    if started():
        dist.broadcast_object_list(result)
    return result[0]


def mean(x):
    """A tensor -> its mean over all processes."""
    if started():
        x = x / processes()   # not every backend knows ReduceOp.AVG
        dist.all_reduce(x)
    return x


class _Loss(torch.nn.Module):
    """A loss as a module, since DistributedDataParallel needs one whose forward() it can watch."""

    def __init__(self, loss, model):
        super().__init__()
        self.loss, self.model = loss, model

    def forward(self, *batch):
        return self.loss(self.model, *batch)


def with_mean_gradients(loss, model):
    """loss(model, *batch) -> a function of the batch, after whose backward() the parameters of
    every process have the mean of all gradients."""
    if not started():
        return functools.partial(loss, model)
    return DistributedDataParallel(_Loss(loss, model))


def own(batch):
    """What is there for each picture of a batch, (B, ...) -> for those of this process,
    (B / processes, ...)."""
    share = len(batch) // processes()
    return batch[rank() * share:][:share]


def whole(own_features):
    """The inverse of own: (B / processes, E) -> (B, E), in every process.

    From all B, every one of the P processes is to compute the same loss. Features lead back to the
    parameters in their own process only, and with_mean_gradients makes (sum of P gradients) / P of
    what comes out: so the derivative is multiplied by P here.
    """
    if not started():
        return own_features
    everyones = [torch.empty_like(own_features) for _ in range(processes())]
    dist.all_gather(everyones, own_features.detach().contiguous())
    moving = own_features - own_features.detach()   # zero, with a derivative
    everyones[rank()] = own_features.detach() + processes() * moving
    return torch.cat(everyones)


def in_pieces(function, pieces, *tensors):
    """function(*tensors), (B, ...) each -> what it returns of each piece, one after the other: as
    many rows as there are pictures, or pieces.

    The gradient is that of the whole batch, whatever loss follows. Of each piece its output alone
    is kept, and all else that its gradient needs is computed again when the gradient is wanted:
    memory for one piece, at the cost of a second forward pass (Chen et al. 2016, "Training Deep
    Nets with Sublinear Memory Cost", arXiv 1604.06174).
    """
    if pieces == 1:
        return function(*tensors)
    parts = zip(*(tensor.chunk(pieces) for tensor in tensors))
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])
