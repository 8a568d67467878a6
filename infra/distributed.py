"""Data-parallel training: each rank computes its part of the batch, then gradients are averaged.

    torchrun --nproc_per_node 2 train.py ddpm      without torchrun these are no-ops
"""
import atexit
import contextlib
import datetime
import os
import sys

import torch
import torch.distributed as dist

from infra import cli


def init():
    """Join the other ranks, if torchrun has started this process; it sets these variables."""
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
        return
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo",
                            timeout=datetime.timedelta(days=1))   # rank 0 may render a data set
    atexit.register(dist.destroy_process_group)
    if rank():
        sys.stdout = open(os.devnull, "w", errors="replace")   # rank 0 prints, errors are of all


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if world_size() > 1 else 0


def local_rank():   # among the processes of this machine
    return int(os.environ["LOCAL_RANK"]) if world_size() > 1 else 0


def pick_device(name="auto"):
    """cli.pick_device, but each rank gets a GPU of its own."""
    if world_size() > 1 and torch.cuda.is_available() and name in ("auto", "cuda"):
        if local_rank() >= torch.cuda.device_count():
            raise cli.UserError(f"there are {torch.cuda.device_count()} GPUs; start no more "
                                "processes a machine, or use --device cpu")
        torch.cuda.set_device(local_rank())   # from here on it is what "cuda" means
    device = cli.pick_device(name)
    if world_size() > 1 and (device.type == "mps" or device.index is not None):
        raise cli.UserError("several processes cannot share one GPU; use --device cpu")
    return device


@contextlib.contextmanager
def local_rank_0_first():
    """Context that local rank 0 of each machine completes before the other ranks enter it."""
    if local_rank():
        any_rank(False)   # a barrier
    yield
    if not local_rank():
        any_rank(False)


def any_rank(*flags):
    """For each boolean, whether it is true in any rank -> the same list in every rank."""
    flags = torch.tensor(flags, dtype=torch.int32)
    if world_size() > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.bool().tolist()


def broadcast(make):
    """make() in rank 0 -> its result, in every rank."""
    result = [make() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(result)
    return result[0]


def mean_over_ranks(tensor):
    """The mean of a tensor over all ranks -> the same tensor in every rank."""
    if world_size() > 1:
        tensor = tensor / world_size()   # not every backend has ReduceOp.AVG
        dist.all_reduce(tensor)
    return tensor


def average_gradients(model):
    """Replace the gradients by their means over all ranks; call it after backward()."""
    if world_size() > 1:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = mean_over_ranks(torch.cat([grad.flatten() for grad in grads]))   # in one message
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(mean.view(grad.shape))
