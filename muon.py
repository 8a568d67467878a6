"""Muon, the optimizer: gradient descent with momentum, whose every step is made orthogonal.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
        kellerjordan.github.io/posts/muon
    Liu et al. 2025, "Muon is Scalable for LLM Training"
        arxiv.org/abs/2502.16982

Half an hour on two CPU cores is short for a diffusion model, so a step must teach as much as it
can. The gradient of a layer's weights is a matrix, large in a few directions and much smaller in
most others. AdamW rescales single numbers and cannot see directions; Muon sets the singular values
of the whole matrix to about 1, so that rare directions count too. Here that takes less than half of
AdamW's steps to the same loss, and a step costs about 12 % more (RESULTS.md).

The chapters can be read without this file; train.py needs it. It imports nothing of ours.
torch.optim.Muon, in newer versions of torch, takes matrices but no kernels of convolutions.
"""
import torch
from torch import nn


def split(model):
    """-> the parameters that are for Muon, and all others, for AdamW.

    Muon gets the weights of linear layers and convolutions, a kernel (c_out, c_in, k, k) as a
    matrix (c_out, c_in k k), if both sides are at least 32: a narrower one, such as that of a last
    layer that ends in colours, has few directions. AdamW gets the rest: biases, norms, embeddings.
    """
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    matrices = [m.weight for m in layers if min(m.weight.flatten(1).shape) >= 32]
    taken = {id(weight) for weight in matrices}
    return matrices, [p for p in model.parameters() if id(p) not in taken]


class Muon(torch.optim.Optimizer):
    """For parameters W that are matrices (m, n), or kernels of convolutions; see split. G: grad.

    M <- momentum M + (1 - momentum) G,   O = orthogonalized(momentum M + (1 - momentum) G),
    W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(m, n)) O

    Matrices of one shape are a parameter group and are dealt with as one stack, because each of
    them alone is too small to keep two cores busy, or a GPU.
    """

    def __init__(self, weights, lr, weight_decay, momentum=0.95):
        shapes = {}
        for weight in weights:
            shapes.setdefault(weight.shape, []).append(weight)
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([{"params": alike} for alike in shapes.values()], defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights, lr, momentum = group["params"], group["lr"], group["momentum"]
            grads = torch.stack([weight.grad.flatten(1) for weight in weights])      # (N, m, n)
            state = self.state[weights[0]]   # of the whole stack
            if not state:
                state["momentum_buffer"] = torch.zeros_like(grads)
            buffer = state["momentum_buffer"].lerp_(grads, 1 - momentum)
            updates = orthogonalized(grads.lerp(buffer, momentum))   # Nesterov momentum
            # A root mean square of 0.2, as AdamW's updates usually have (Liu et al. eq. 4).
            scale = 0.2 * max(updates.shape[1:]) ** 0.5
            for weight, update in zip(weights, updates):
                weight.mul_(1 - lr * group["weight_decay"])
                weight.sub_(update.view_as(weight), alpha=lr * scale)


def orthogonalized(matrices):
    """X = U S V^T -> about U V^T, the same rotations without the stretching. X: (N, m, n)

    Five times X <- (a + b X X^T + c (X X^T)^2) X (Jordan et al. 2024), which takes each singular
    value s to a s + b s^3 + c s^5: all of [0.01, 1] ends between 0.68 and 1.14.

    differs from the original: the five brackets are multiplied together first and with X only
    once, because X X^T is small and X, of a convolution, about nine times as wide. And float32:
    bfloat16 loses the small singular values of X X^T (RESULTS.md).
    """
    X = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)   # no singular value exceeds 1
    if X.shape[1] > X.shape[2]:
        return orthogonalized(X.mT).mT
    a_identity = 3.4445 * torch.eye(X.shape[1], dtype=X.dtype, device=X.device)
    bracket = lambda gram: torch.baddbmm(a_identity - 4.7750 * gram, gram, gram, alpha=2.0315)
    gram = X @ X.mT
    product = step = bracket(gram)
    for _ in range(4):
        gram = step @ gram @ step   # X X^T of the next X
        step = bracket(gram)
        product = step @ product
    return product @ X


if __name__ == "__main__":   # what it does to a matrix that is all in one direction, nearly
    torch.manual_seed(0)
    gradient = torch.randn(4, 1) @ torch.randn(1, 6) + 0.1 * torch.randn(4, 6)
    step = orthogonalized(gradient[None])[0]
    for name, matrix in (("gradient", gradient), ("Muon's step", step)):
        values = ", ".join(f"{s:.2f}" for s in torch.linalg.svdvals(matrix))
        print(f"{name:12} has singular values {values}")

# gradient     has singular values 5.98, 0.43, 0.16, 0.10
# Muon's step  has singular values 1.12, 1.03, 0.80, 0.70
