"""The diffusion model without guidance: loss on held-out images, KID by number of steps."""
from argparse import Namespace

import torch

import data
import sample
import tinyddpm
from experiments import evaluator, metrics

STEPS_IMAGES = 100   # images for each number of steps, enough for KID
STEPS = (5, 10, 20, 50, 100, 1000)


def unguided_quality(models, args):
    """The diffusion model: v-error by t on held-out images, KID of samples by steps and eta."""
    _, _, x_0, eps = evaluator.images_and_noise(models, args.seed)
    for t in (50, 150, 300, 500, 700, 900):
        timesteps = torch.full((len(x_0),), t, device=x_0.device)
        parts = zip(x_0.split(250), timesteps.split(250), eps.split(250))
        yield {"t": t, "v_error": metrics.mean(torch.cat(
            [tinyddpm.ddpm_loss(models.unet, *part, models.alpha_bar) for part in parts]))}
    judge, _ = sample.load_judge(models.captions, args.judge, x_0.device)
    if judge is None:
        return
    real = evaluator.random_real(models, judge, STEPS_IMAGES, args.seed)
    for eta in (0., 1.):
        for steps in STEPS:
            changed = Namespace(**{**vars(args), "steps": steps, "eta": eta, "recurrence": 1})
            x = data.to_float(evaluator.unguided(models, changed, len(real)).images)
            kid, error = metrics.kid(real, metrics.judge_features(judge, x.to(x_0.device)))
            yield {"eta": eta, "steps": steps, "kid": kid, "kid_error": error}
