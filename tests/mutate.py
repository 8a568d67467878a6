"""Mutation testing: change one line of the source at a time; a test must then fail.

    python tests/mutate.py [WORD]     all mutants, or those whose file or text has this word

A mutant is a text of a file, which stands there once, what replaces it, and the tests that should
notice: of guide.py "interval, cost; sample: a_prompt" are those of tests/test_guide.py with one of
these words in their names, and one of tests/test_sample.py. Not part of CI: it takes five minutes
on two cores, and forks, as Windows cannot.
"""
import collections
import concurrent.futures
import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKERS, LEAST = 2, 0.95   # processes; the fraction of mutants that must be killed
TOO_SLOW = -14             # exit code of a process that signal.alarm has ended: a mutant is killed

# A worker imports what takes long, and forks for each line of arguments for pytest.
WORKER = """
import json, os, signal, sys
import numpy, PIL.Image, pytest, torch, torch._dynamo   # the last one for optimizers
for line in sys.stdin:
    if not (child := os.fork()):
        signal.alarm(300)   # seconds
        out = os.open("../out.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        code = pytest.main(json.loads(line))
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

# File -> (text, replacement, tests)
MUTANTS = {"tinyddpm.py": [
    ("torch.cat([torch.ones(1), ", "torch.cat([torch.ones(1) - 1e-3, ", "cosine"),
    ("return alpha_bar[t].view", "return alpha_bar[t - 1].view", "q_sample"),
    ("x_0 + (1 - a).sqrt() * eps\n", "x_0 + (1 - a) * eps\n", "q_sample"),
    ("[angle.sin(), angle.cos()]", "[angle.cos(), angle.sin()]", "timestep_embedding"),
    ("* (1 + scale) + shift", "* (1 + scale)", "residual_block"),
    ("* (1 + scale) + shift", "+ shift", "residual_block"),
    ("self.dropout(F.silu(h))", "F.silu(h)", "dropout"),
    ("conv2 = zero_init(", "conv2 = (", "at_start"),
    ("out = zero_init(", "out = (", "at_start"),
    ("if level in config.attention else", "if False else", "attention"),
    ("time = time + self.cond_proj(cond)", "time = time", "condition"),
    ("[h, skips.pop()]", "[h, 0 * skips.pop()]", "skip"),
    ("unet.eval().requires_grad_(False)", "unet.requires_grad_(False)", "checkpoint"),
    ("((part + u) *", "((part + 0.5) *", "stratified"),
    ("((part + u) *", "((batch * u) *", "stratified"),
    ("v = a.sqrt() * eps -", "v = a.sqrt() * eps +", "true_v"),
    ("v_hat = unet(x_t, t, cond)", "v_hat = unet(x_t, t)", "condition"),
    ("unet(x_t, t, cond).float()", "unet(x_t, t).float()", "condition"),
    ("** (6.94 + 1)", "** 6.94", "ema"),
    ("list(model.parameters()), 1 - decay", "list(model.parameters()), decay", "ema"),
    ("return (x_t - a.sqrt() * x_0_hat)", "return (x_t - a * x_0_hat)", "tweedie"),
    ("sigma = eta * ((1", "sigma = ((1", "straight, eta"),
    ("(1 - a_next - sigma ** 2)", "(1 - a_next)", "variance"),
    ("direction + sigma * z", "direction", "variance"),
    ("half_ratio = 0.5 *", "half_ratio = 1. *", "multistep"),
    ("generator=g) for g in", "generator=generators[0]) for g in", "noise_of"),
    ("eta=1.0, clamp=True,", "eta=1.0, clamp=False,", "clamp"),
    ("x_0_hat = x_0_hat.clamp(-1, 1)", "x_0_hat = x_0_hat", "clamp"),
    ("    callback(t, x_t, x_0_hat)\n", "    callback(t, x_t, x_t)\n", "clamp"),
    ("recurrence if t_next > 0 else 1", "recurrence", "recurrence"),
    ("(1 - alpha).sqrt() * z, None", "(1 - alpha) * z, None", "recurrence"),
    ("(1 - alpha).sqrt() * z, None", "(1 - alpha).sqrt() * z, t_prev", "recurrence"),
    ("if t_prev is not None and t_next > 0:", "if False:", "multistep"),
    ("x_t + step * v, t_next)) / 2", "x_t + step * v, t)) / 2", "inversion"),
    ("device=x_0.device), eps, alpha_bar)", "device=x_0.device), 0 * eps, alpha_bar)",
     "inversion")],
"tinyclip.py": [
    ("ids = [self.start, *self", "ids = [self.end, *self", "batch_has"),
    (".triu(1)", ".triu(2)", "attention"),
    ("x = x[:, :n] + self.attention", "x = self.attention", "pre_ln"),
    ("scale, shift = time_proj(time)[", "scale, shift = time_proj(0 * time)[", "enters"),
    ("* (1 + scale) + shift)", "* (1 + scale))", "stem"),
    ("* (1 + scale) + shift)", "+ shift)", "stem"),
    ("(self.class_token + time)", "(self.class_token + 0 * time)", "enters"),
    ("patches], dim=1) + self.position_embedding", "patches], dim=1)", "image_encoder"),
    ("self.projection(self.ln_post(class_token))", "self.projection(class_token)", "image_encoder"),
    ("(self.ln_pre(tokens))", "(tokens)", "image_encoder"),
    (" + self.position_embedding[:length]", "", "order_of_words"),
    ("text_heads, causal=True)", "text_heads, causal=False)", "padding"),
    ("device=x.device), end_index]", "device=x.device), -1]", "padding"),
    ("min(1 / 0.07,", "min(100,", "at_start"),
    ("min(1 / 0.07, 0.99 * config.max_logit_scale)", "1 / 0.07", "low_limit"),
    ("nn.init.zeros_(self.log_scale_time.weight)", "pass", "at_start"),
    ("x.device.type, enabled=False)", "x.device.type, torch.bfloat16)", "full_precision"),
    (".clamp(max=math.log(self.config.max_logit_scale))", "", "scaled_cosines"),
    ("scale_time(self.time_embedding(t))", "scale_time(self.time_embedding(0 * t))", "no_t_is"),
    ("captions = F.normalize(text_features.float(), dim=-1)", "captions = text_features.float()",
     "scaled_cosines"),
    ("sum(F.normalize(self.encode_captions(texts).float(), dim=-1)",
     "sum(self.encode_captions(texts)", "ensemble"),
    ("features, t).softmax(dim=1)", "features, t).softmax(dim=0)", "sample: probabilities"),
    ("same / same.sum(dim=1, keepdim=True)", "torch.eye(len(same))", "contrastive"),
    ("(logits.T, targets)    #", "(logits, targets)    #", "contrastive"),
    ("return (loss_i + loss_t) / 2", "return loss_i", "contrastive"),
    ("TEXT_TO_IMAGE = 0.1", "TEXT_TO_IMAGE = 0.", "train: chance"),
    ("keepdim=True).clamp(min=1)\n", "keepdim=True)\n", "closed_set_loss"),
    ("true_of.any(1).sum().clamp(min=1)", "true_of.any(1).sum()", "closed_set_loss"),
    ("true_of = is_true[clean].T", "clean = logits[:, 0] < 9; true_of = is_true.T",
     "text_to_image"),
    ("antialias=True) / 2 + 0.5", "antialias=True) / 2", "published: preprocessing")],
"guide.py": [
    ("labels, temperature)", "labels)", "experiments: lookahead_with"),
    ("(text_features.device), t_fraction)", "(text_features.device), T_FRACTION)",
     "experiments: lookahead_with"),
    ("scale * (1 - a) / a.sqrt() * grad\n", "scale * (1 - a) * grad\n", "dhariwal"),
    ("x_0_hat.detach() + scale *", "x_0_hat.detach() - scale *", "dhariwal"),
    ("<= interval[1]:\n            return denoise(x_t, t)",
     "< interval[1]:\n            return denoise(x_t, t)", "interval"),
    ("<= interval[1]:\n            return x_0_hat", "< interval[1]:\n            return x_0_hat",
     "interval"),
    ("set_grad_enabled(through_unet):\n                x", "set_grad_enabled(False):\n"
     "                x", "cost"),
    ("set_grad_enabled(through_unet):\n                x", "set_grad_enabled(True):\n"
     "                x", "cost"),
    ("x_0 = x_0 + (x_T - x_T.detach())", "x_0 = x_0 - (x_T - x_T.detach())", "optimising"),
    ("if through_unet else denoise", "if False else denoise", "through_the_unet"),
    ("x_T.lerp(x_start, DECAY)", "x_T", "optimising"),
    ("abs().clamp(min=LIMIT))", "abs().clamp(min=9 * LIMIT))", "white_noise"),
    ("return x / x.square()", "return 2 * x / x.square()", "white_noise"),
    ("value > highest", "value < highest", "optimising, through_the_unet"),
    ("TEMPERATURE = 5.", "TEMPERATURE = 1.", "each_log_p"),
    (" & (values >= 0)", "", "does_not_name"),
    ("values = labels[targets][:, None]", "values = labels[targets - 1][:, None]", "each_log_p"),
    ("return temperature * log_value.sum", "return log_value.sum", "each_log_p"),
    ("clip.encode_image(x_t, t), text_features, t)",
     "clip.encode_image(x_t, 0 * t), text_features, t)", "each_log_p"),
    ("log_p(x_t, torch.zeros_like(t), x_0_hat)", "log_p(x_t, t, x_0_hat)", "each_log_p"),
    ("log_p(x_0_hat, torch", "log_p(x_t, torch", "each_log_p"),
    ("PIXEL_STD = 0.5", "PIXEL_STD = 1.", "lookahead_is"),
    ("(t_fraction * t).long()", "t", "lookahead_is"),
    ("jacobian = r2 * a.sqrt() / (1 - a)", "jacobian = r2 * a.sqrt()", "lookahead_is"),
    ("predict_eps(x_t, x_0_hat, a).detach()", "predict_eps(x_t, x_0_hat, a)", "lookahead_is"),
    ("T_FRACTION = 0.75", "T_FRACTION = 0.5", "each_log_p"),
    ("lookahead, t_fraction=0.)", "lookahead, t_fraction=0.5)", "each_log_p"),
    ("denoiser(unet, alpha_bar, cond), scale", "denoiser(unet, alpha_bar), scale",
     "classifier_free"),
    ("denoise = denoiser(unet, alpha_bar, cond)", "denoise = denoiser(unet, alpha_bar)",
     "text_feature"),
    ('if name in ("none", "latent"):', 'if name == "none":', "text_feature"),
    ("weak, alpha_bar, autoguidance, cond)", "weak, alpha_bar, autoguidance)", "text_feature"),
    ("scale * (x_0_hat - x", "-scale * (x_0_hat - x", "classifier_free"),
    ("x_0_hat_worse = worse(x_t, t)", "x_0_hat_worse = worse(x_t, t).detach()", "weak_one"),
    ("extrapolate(denoiser(weak, alpha_bar), denoise,", "extrapolate(denoise, denoise,", "a_line"),
    ("unet, weak, alpha_bar, autoguidance)", "unet, None, alpha_bar, 1.)", "a_line"),
    ("Method(lookahead, 128.,", "Method(lookahead, 0.,", "sample: own_settings"),
    ("Method(x0, 32., (1, 950), through_unet=True)", "Method(x0, 32., (1, 950))", "cost"),
    ("(models.text_features)[targets]", "(models.text_features)[targets.flip(0)]", "text_feature"),
    ("targets, models.caption_labels)", "targets, models.caption_labels.roll(1, 0))", "belongs_to"),
    ("scale, interval, method.through_unet)", "scale)", "own_interval, cost")],
"data.py": [
    ("/ 127.5 - 1\n", "/ 127.5\n", "to_uint8"),
    ("x.float().clamp(-1, 1)", "x.float()", "to_uint8"),
    ("SeedSequence(entropy, ", "SeedSequence(sum(entropy), ", "generators"),
    ("spawn_key=(key,) if key else ()", "spawn_key=()", "generators"),
    ('"validation": cars.VALIDATION', '"validation": cars.TRAIN', "disjoint"),
    ('"judge": cars.JUDGE_TRAIN', '"judge": cars.TRAIN', "disjoint"),
    ('"judge-2": cars.JUDGE_2_TRAIN', '"judge-2": cars.JUDGE_TRAIN', "disjoint"),
    ('"judge-test": cars.JUDGE_TEST', '"judge-test": cars.JUDGE_TRAIN', "disjoint"),
    ("range(SPLITS[split], SPLITS[split] + count)", "range(count)", "captions_of_their"),
    ("cars.caption_index(labels)", "cars.caption_index(labels)[::-1]", "captions_of_their"),
    ("cars.descriptions(192)", "cars.descriptions(1)", "captions_of_their"),
    ("cars.PARTIAL_TRUE_OF,\n", "cars.PARTIAL_TRUE_OF[::-1],\n", "captions_of_their"),
    ("caption_labels(np.arange(K)),", "caption_labels(np.arange(K))[::-1],", "captions_of_their"),
    ("[caption_of_file[indices[i]] for i", "[caption_of_file[i] for i", "class_folder"),
    ("dtype=np.int64)[:, None]  ", "dtype=np.int64)[::-1, None]  ", "class_folder"),
    ("default_rng([seed, step, rank])", "default_rng([seed, step])", "a_batch"),
    ("default_rng([seed, step, rank])", "default_rng([step, rank])", "a_batch"),
    ("len(dataset.images), size=n", "len(dataset.images) // 2, size=n", "equally_often"),
    ("(2, B, 1, 1))", "(2, 1, 1, 1))", "augmented"),
    ("(offset < cutout)", "(offset <= cutout)", "augmented")],
"cars.py": [
    ("= 0, 10_000_000, 20", "= 0, 10_000, 20", "data: disjoint"),
    ("all(a in (None, b) for", "any(a in (None, b) for", "less_true_of"),
    ("plain if i % 4 == 0 else", "plain if i == 0 else", "descriptions"),
    ("for labels in [*full, *PARTIAL]]", "for labels in [*full[::-1], *PARTIAL]]", "descriptions"),
    ("if not any(pair <= {noun, m, s} for pair in APART):", "if True:", "never_meet"),
    ('paints["second"] = paints["main"]', "pass", "same_paint"),
    ("default_rng([seed, index])", "default_rng([index])", "function_of_seed"),
    ("rng.uniform(-spread, spread, 3), 0, 1)", "0, 0, 1)", "weights_were_trained_on")],
"judge.py": [
    ("logits.float(), labels[:, i])", "logits.float(), labels[:, 0])", "sum_of_the_heads"),
    ("self.config.dropout, self.training)", "self.config.dropout, True)", "dropout"),
    ("self.config.dropout, self.training)", "0., self.training)", "dropout"),
    ('mode="area")', 'mode="nearest")', "area")],
"train.py": [
    ("CLEAN_FRACTION = 0.125", "CLEAN_FRACTION = 0.", "what_clip"),
    ("PARTIAL_WEIGHT = 0.25", "PARTIAL_WEIGHT = 0.", "what_clip, chance"),
    ("options.shift, options.cutout", "0, 0", "augmented"),
    ("return x_t + step *", "return x_t - step *", "perturbation"),
    ("(1 + 3 * sigma)", "4", "perturbation"),
    ("perturbation=options.perturbation", "perturbation=1.", "what_clip"),
    ("[:round(PERTURBED_FRACTION * B)]", "", "perturbed"),
    ("t[moved], text_features[:K]", "t[:len(moved)], text_features[:K]", "perturbed"),
    ("logits, logits.argmax(dim=1)", "logits, logits.argmin(dim=1)", "perturbation"),
    ("t[clean] = 0", "pass", "clip_objective"),
    ("clean = randperm(B)[:math.ceil", "clean = torch.arange(B)[:math.ceil", "clip_objective"),
    ("x_t = tinyddpm.q_sample(x_0, t, eps, alpha_bar)\n\n", "x_t = x_0\n\n", "clip_objective"),
    ("randperm(P)[", "torch.arange(P)[", "template_for_each"),
    ("torch.randint(S, ids.shape", "torch.randint(1, ids.shape", "template_for_each"),
    ("torch.randint(S, ids.shape", "torch.randint(S, (1,)", "template_for_each"),
    ("timesteps(B, generator)\n    clean", "timesteps(B, generator) // 2 + 1\n    clean",
     "clip_objective"),
    ("text_features, t)  ", "text_features, 0 * t)  ", "clip_objective"),
    ("loss(logits, caption_ids)", "loss(logits, caption_ids.roll(1))", "papers_loss"),
    ("F.one_hot(caption_ids, K)", "F.one_hot(caption_ids.roll(1), K)", "clip_objective"),
    ("K], is_true, clean)", "K], is_true, torch.arange(B))", "clip_objective"),
    ("partial_true_of[partial][:, caption_ids].T",
     "partial_true_of[partial.roll(1)][:, caption_ids].T", "clip_objective"),
    ("partial_true_of[partial][:, caption_ids].T",
     "partial_true_of[partial][:, caption_ids.roll(1)].T", "clip_objective"),
    ("device=cond.device) < 0.1", "device=cond.device) < 0.9", "in_ten_is_dropped"),
    ("return cond.masked_fill(drop, 0.)", "return cond", "in_ten_is_dropped"),
    ("draw - 0.3) / 0.3", "draw - 0.1) / 0.3", "clean_hidden"),
    ("eps, alpha_bar, cond).mean()", "eps, alpha_bar, None).mean()", "over_all_timesteps"),
    ("in templates]).to(device)   ", "in templates[:1]]).to(device)   ", "what_clip"),
    ("model, x_0, caption_ids[indices], tokens", "model, x_0, caption_ids[indices - 1], tokens",
     "what_clip"),
    ("batch(validation, 0, 0, 500, device)\n        generator =",
     "batch(dataset, 0, 0, 500, device)\n        generator =", "previews"),
    ("probs(tinyddpm.q_sample(x_0, t, eps, alpha_bar)", "probs(x_0", "previews"),
    ("batch(validation, 0, 0, 500, device)\n        generators,",
     "batch(dataset, 0, 0, 500, device)\n        generators,", "previews"),
    ("data.to_float(validation.images)", "data.to_float(dataset.images)", "previews"),
    ("chance += tinyclip.TEXT_TO_IMAGE *", "chance += 0 *", "chance"),
    ("chance += PARTIAL_WEIGHT *", "chance += 0 *", "chance"),
    ("features[template, caption_ids]", "features[template, caption_ids.roll(1)]",
     "unclip: learns_means"),
    ("aug_level, second=True)", "aug_level, second=False)", "unclip: both_doublings"),
    ("torch.randint(size + 1, ()", "torch.randint(1, ()", "unclip: both_doublings"),
    ("a + (1 - a) * x_0.square()", "a * x_0.square()", "ddpm_learns"),
    ('"templates": templates[:ENSEMBLE]', '"templates": templates[:1]', "texts_of_its_training"),
    ("dataset.templates[0][K:]", "dataset.templates[0][:K]", "texts_of_its_training"),
    ("guide.scale_features(text_features[:", "(text_features[:", "text_features_of_each"),
    ("drop_text(cond[caption_ids[", "drop_text(cond[caption_ids.roll(1)[", "text_features_of_each"),
    ("model, x_0, labels[indices])", "model, x_0, labels[indices - 1])", "judge_learns"),
    ("options.lr, options.weight_decay)", "options.lr, 0.)", "weight_decay"),
    ("betas=(0.9, 0.99), weight_decay=0.", "betas=(0.9, 0.99), weight_decay=0.1", "weight_decay"),
    ("checkpoint.fp16_weights(self.ema)", "checkpoint.fp16_weights(self.model)", "moving_average"),
    ('(saved["ema"])', '(saved["model"])', "same_bits"),
    ('"CLIP": task.content.get("clip"), ', "", "another_clip_is"),
    (" + dataset.caption_ids.tobytes())", ")", "other_captions"),
    ("return options.lr * step / warmup", "return options.lr", "learning_rate"),
    ("options.lr * 0.5 * (1 + math", "options.lr * (1 + math", "learning_rate"),
    ("torch.from_numpy(indices).to", "torch.from_numpy(indices - 1).to", "their_batches"),
    ("generator) / options.accumulate", "generator)", "micro_batches"),
    ("indices.chunk(options.accumulate)", "indices.roll(1).chunk(options.accumulate)",
     "their_batches"),
    ("distributed.average_gradients(run.model)", "pass", "distributed: equal_weights"),
    ("run.model.parameters(), 1.0)", "run.model.parameters(), 1e9)", "clipped"),
    ('group["lr"] = learning_rate(step, options)', 'group["lr"] = options.lr', "learning_rate"),
    ("        optimizer.zero_grad()\n", "", "their_batches"),
    ("ema_update(run.ema, run.model, step)", "ema_update(run.ema, run.model, 1)", "moving_average"),
    ("measured[:, 0].mean().item()", "measured[-1, 0].item()", "history"),
    ("task.preview(run.ema, folder)", "task.preview(run.model, folder)", "moving_average"),
    ('("judge", "judge-test"), min', '("train", "judge-test"), min', "splits"),
    ('("judge", "judge-test"), min', '("judge", "judge"), min', "splits"),
    ("size, count, splits[1])", "size, count, splits[0])", "splits"),
    ("torch.manual_seed(args.seed)", "torch.manual_seed(0)", "splits")],
"sample.py": [
    ("SURE = 0.9, 0.97", "SURE = 0.1, 0.97", "must_be_near"),
    ("for texts in [*models.templates, *names]", "for texts in [*models.templates, names[1]]",
     "class_names"),
    ("=features[K:]", "=features[:-K]", "those_of_their_texts"),
    ('set(captions) <= set(content["captions"])', "True", "judge_is_that"),
    ('not (known <= trained or trained <= known)', "False", "do_not_fit"),
    ('if condition is None and "clip" in ddpm_content:', "if False:", "do_not_fit"),
    ('if {*template.format("").split()} <= {*models.words}]', "]", "worded"),
    ("[[template.format(text) for text in texts] for template in known]",
     "[texts for template in known]", "new_prompt"),
    ("|= models.partial_true_of[index - K]", "|= models.partial_true_of[0]", "less"),
    ("labels[:, 0] = K +", "labels[:, 0] = 0 *", "new_prompt"),
    ('text.split(" or ")', "[text]", "or_allows"),
    ("torch.randint(len(indices), ()", "torch.randint(1, ()", "one_of_the_captions"),
    ('"captions", config.seed, i)', '"captions", config.seed, 0)', "one_of_the_captions"),
    ("models, caption_ids[indices]", "models, caption_ids[:len(indices)]", "one_of_the_captions"),
    ("caption_ids[indices], config.scale,", "caption_ids[indices], None,", "function_of_prompt"),
    ("caption_ids[indices], config.scale, config.interval,",
     "caption_ids[indices], config.scale, None,",
     "function_of_prompt"),
    ("config.autoguidance, generators)", "1., generators)", "by_a_weak"),
    ("scale, interval, autoguidance)\n    z =", "scale, interval, 1.)\n    z =", "by_a_weak"),
    ('content["captions"] == ddpm_content["captions"]', "True", "weak_ddpm_is"),
    ('content["steps"] < ddpm_content["steps"]', "True", "weak_ddpm_is"),
    ("config = replace(config, autoguidance=1.)", "pass", "by_a_weak"),
    ("autoguidance is not None\n", "autoguidance\n", "by_a_weak"),
    ("or METHODS[args.method].autoguidance != 1", "or True", "by_a_weak"),
    ("config.seed, i) for i in indices", "config.seed, i - indices[0]) for i in indices",
     "function_of_prompt"),
    ("config.steps, config.eta,", "config.steps, 1.,", "function_of_prompt"),
    ("alpha_bar, config.steps, config.eta", "alpha_bar, 3, config.eta", "function_of_prompt"),
    ("recurrence=config.recurrence,", "recurrence=2,", "function_of_prompt"),
    ("callback=None if images else callback", "callback=callback", "calls_back"),
    ('config = replace(config, method="none")', "pass", "without_a_prompt_is"),
    ('config = replace(config, method="x0-fast")', "pass", "clean_images"),
    ("for name in METHOD_SETTINGS if getattr(config, name) is None}",
     "for name in METHOD_SETTINGS}", "own_settings"),
    ("x_T[indices] if x_T is not None else", "0 * x_T[indices] if x_T is not None else",
     "given_noise"),
    ("x_0.expand_as(part), part,", "x_0.expand_as(part), 0 * part,", "edit_begins"),
    ("LR if x_T is None else guide.LR_EDIT", "LR", "edit_begins"),
    ("torch.linspace(0, 0.5, config.n)", "torch.linspace(0, 1, config.n)", "ways_between"),
    ("config.interval, config.vary, noise)", "config.interval, 0., noise)", "variations"),
    ("x_0, z).expand(config.n, -1, -1, -1)", "x_0, z).expand(config.n, -1, -1, -1) * 0",
     "ways_between"),
    ("0) for _ in range(2)]", "i) for i in range(2)]", "one_prompt_to"),
    (".all(dim=2).any(dim=1)", ".any(dim=2).any(dim=1)", "by_hand"),
    ("[:, allowed].sum(dim=1).mean()", "[:, allowed].mean()", "by_hand"),
    ("[:8], x_0_hat[:8]", "[:8], x_t[:8]", "image_from_a_prompt")],
"unclip.py": [
    ("h = h + self.text_proj(cond)", "pass", "no_text_is"),
    ("timestep_embedding(t, h", "timestep_embedding(0 * t, h", "no_text_is"),
    ("alpha_bar, steps, clamp=False)", "alpha_bar, steps)", "not_clamped"),
    (".sum(dim=2).argmax(dim=0)", ".sum(dim=2).argmin(dim=0)", "best_of"),
    ("[signal * (signal * z", "[(signal * z", "level_hides"),
    ("* noise), 1 - noise_level]", "* noise), noise_level]", "level_hides"),
    ("slerp(x[:1], x[1:], f)", "slerp(x[1:], x[:1], f)", "sample: ways_between"),
    ("torch.sin(fraction * angle) *", "fraction * angle.sin() *", "slerp"),
    ("* flat_b / length_b", "* flat_b / length_a", "slerp"),
    (".clamp(1e-4, math.pi - 1e-4)", "", "slerp"),
    ("scale_features(difference)", "scale_features(-difference)", "text_diff"),
    ("torch.full_like(aug_level, second)", "torch.zeros_like(aug_level)", "first_and_the_second"),
    ("(1 + scale) + shift))", "(1 + scale)))", "first_and_the_second"),
    ('mode="bicubic")', 'mode="bilinear")', "untrained"),
    ("second=high.shape[-1] > low.shape[-1]", "second=False", "average_of"),
    ("(high if aug_level else match_average(high, low))", "(high)", "average_of"),
    ("(high if aug_level else match_average(high, low))", "match_average(high, low)", "mended"),
    ("alpha_bar[:t + 1]", "alpha_bar", "redrawn_images")],
"infra/muon.py": [
    ("orthogonalize(grad.lerp(buffer, momentum))", "orthogonalize(buffer)", "muon"),
    ("lerp_(grad, 1 - momentum)", "lerp_(grad, momentum)", "muon"),
    ("0.2 * max(update.shape)", "0.2 * min(update.shape)", "muon"),
    ("weight.mul_(1 - lr * group", "weight.mul_(1 - group", "muon"),
    ("alpha=lr * scale", "alpha=scale", "muon"),
    (".shape) >= 32]", ".shape) > 32]", "optimizer")],
"infra/distributed.py": [
    ("tensor = tensor / world_size()", "tensor = tensor / 1", "infra: two_ranks"),
    ("dist.ReduceOp.MAX", "dist.ReduceOp.MIN", "infra: two_ranks"),
    ("make() if rank() == 0 else None", "make()", "infra: two_ranks"),
    ("\n    if local_rank():\n        any", "\n    if False:\n        any", "infra: two_ranks"),
    ("grad.copy_(mean.view(grad.shape))", "pass", "infra: two_ranks")],
"infra/image_folders.py": [
    ('"train": range(8, 20)', '"train": range(0, 20)', "split; data: disjoint"),
    ('"validation": [0]', '"validation": [5]', "split; data: disjoint"),
    ('"judge-test": [1]', '"judge-test": [2]', "split; data: disjoint"),
    ("(image_folder.objects) if bucket", "(image_folder.files) if bucket", "never_split"),
    ("if len(bucket) < 100:", "if False:", "split"),
    ("for template in TEMPLATES]", "for template in TEMPLATES[:1]]", "data: class_folder"),
    ("[first] for first in firsts]", "[first] for first in firsts[::-1]]", "data: class_folder"),
    ("w[s % len(w)] for w in ways]", "w[0] for w in ways]", "several_captions"),
    ("zip(objects, lines)}", "zip(objects, lines[::-1])}", "srn"),
    ("numbers[i] = -1", "numbers[i] = 0", "broken")],
"infra/checkpoint.py": [
    ("os.fsync(file.fileno())", "pass", "on_the_disk"),
    ("weights_only=True", "weights_only=False", "run_code"),
    ("p.detach().half()", "p.detach()", "fp16"),
    ("in fp16_weights(model).values()))", "in [*fp16_weights(model).values()][:1]))", "checksum")],
"infra/cache.py": [
    ("zlib.crc32(images) == checksum", "True", "damaged"),
    ("in (path, path.with_suffix(\".npz\")):", "in (path,):", "full_disk"),
    ("images[np.asarray(numbers) >= 0]", "images", "in_order"),
    ("if not task[-1].exists()]", "]", "full_disk")],
"experiments/metrics.py": [
    ("return excess.abs().sum().item() / len(probs)",
     "n = torch.bincount(bin_of); return (excess.abs() / n)[n > 0].mean().item()", "calibration"),
    ("return (k.sum() - k.diagonal().sum())", "return k.sum()", "kid"),
    ("/ a.shape[1] + 1) ** 3", "/ a.shape[1] + 1) ** 2", "kid"),
    ("features[caption_ids == k]", "features[caption_ids >= k]", "diversity"),
    ("stage(h)\n        if i in", "stage(h)\n        if 7 in", "features"),
    ("argsort(dim=0, descending=True)", "argsort(dim=0)", "recall")],
"experiments/evaluator.py": [
    ('HELD_OUT, "validation")\n    total', 'HELD_OUT, "train")\n    total', "held_out_images"),
    ("caption_ids[indices]).to", "caption_ids[indices[::-1]]).to", "held_out_images"),
    ("= torch.randn(x_0.shape, g", "= 0 * x_0 + torch.randn(x_0.shape[1:], g", "held_out_images"),
    ('{**vars(args), "scale": scale}', '{**vars(args), "scale": None}', "passed"),
    ("in sample.METHOD_SETTINGS if given[name] is None", "in sample.OWN", "passed"),
    ("tuple(args.interval), args.autoguidance", "tuple(args.interval), 1.", "passed"),
    ("models, part % len", "models, part.flip(0) % len", "passed"),
    ("captions), *settings,", "captions), None, None, None,", "passed"),
    ('"sampling", args.seed, i) for i in', '"sampling", args.seed) for i in', "passed"),
    ("alpha_bar, args.steps, args.eta,", "alpha_bar, 2, args.eta,", "passed"),
    ("alpha_bar, args.steps, args.eta,", "alpha_bar, args.steps, 1.,", "passed"),
    ("recurrence=args.recurrence)", "recurrence=1)", "passed"),
    ("start = 10_000 //", "start = 0 //", "nothing_else"),
    ("probs[subset, k].argmax()", "probs[subset, k].argmin()", "best_of"),
    ("enumerate(targets.tolist())", "enumerate(targets.tolist()[::-1])", "best_of"),
    ("Evaluator(judge, second,", "Evaluator(judge, second and judge,", "an_evaluator"),
    ("for text in models.captions]", "for text in sorted(labels)]", "an_evaluator"),
    ('REAL * args.each, "validation")', 'REAL * args.each, "train")', "real_images"),
    ("of_caption[(skip + used[caption])", "of_caption[used[caption]", "real_images"),
    ("labels[targets.cpu()], (", "labels[targets.cpu().flip(0)], (", "score"),
    ("predict(evaluator.second_judge, x)", "predict(evaluator.judge, x)", "score"),
    ("metrics.mean(also != correct.all(1))", "metrics.mean(also == correct.all(1))", "score"),
    ("torch.arange(len(x)), targets]", "torch.arange(len(x)), targets.flip(0)]", "score"),
    ("others = real[order] if", "others = real if", "score"),
    ("features[order[:len(others)]]", "features[:len(others)]", "score"),
    ("x_0[order[:count]", "x_0[torch.arange(count)", "random_held_out"),
    ("diversity(f / std, targets)", "diversity(f, targets)", "score"),
    ("else spread / real_spread", "else spread", "score")],
"experiments/clip.py": [
    ("x_t = tinyddpm.q_sample(x_0, t, eps, models.alpha_bar)", "x_t = x_0", "by_noise_level"),
    ("models.text_features, t)", "models.text_features, 0 * t)", "by_noise_level"),
    ("logits[i, caption_ids] > logits", "logits[i, caption_ids] < logits", "word_order"),
    ("best == caption_ids)", "best == caption_ids.flip(0))", "by_noise_level"),
    ("== labels[caption_ids, i]", "== labels[caption_ids, 0]", "by_noise_level")],
"experiments/ddpm.py": [
    ('"eta": eta, "recurrence": 1})', '"recurrence": 1})', "each_number"),
    ('"steps": steps, "eta"', '"eta"', "each_number")],
"experiments/ablations.py": [
    ("default_rng(0).permutation(dataset", "array(dataset", "changes_one"),
    ("hold_out_pairs(dataset), hold_out_pairs(validation)", "dataset, validation", "changes_one"),
    ("options.steps // 10)", "options.steps)", "changes_one"),
    ("clean_fraction=1.)", "clean_fraction=0.125)", "changes_one"),
    ("(kind, change, device) for kind in kinds}", "(kind, change, device) for kind in ()}",
     "changed_models"),
    ("[:, [0, 2, 1]]", "[:, [0, 1, 2]]", "composition"),
    ("pair not in PAIRS]", "True]", "held_out_pairs")],
"experiments/variants.py": [
    ("targets, its_own)", "targets, labels)", "joint"),
    ("torch.zeros_like(t))", "t)", "dot_product"),
    ("**{part: value}", "**{}", "each_variant")],
"experiments/guidance.py": [
    ("Namespace(**{**vars(args), **flags})", "args", "setting_of_the"),
    ("models, changed, scale)", "models, changed)", "setting_of_the"),
    ("captions + K * i for i", "captions for i", "same_captions"),
    ("skip=args.each)", "skip=0)", "same_captions"),
    ("models, args, scale)\n", "models, args)\n", "same_captions")],
"experiments/second_judge.py": [
    ('options.images, "judge-2")', 'options.images, "judge")', "second_judge_is"),
    ('"judge-test")\n    torch', '"judge-2")\n    torch', "second_judge_is"),
    ("predict(second or judge, x)", "predict(judge, x)", "two_judges")],
"experiments/zeroshot.py": [
    ("linear_probe(image_features(models, x_seen), seen_labels)",
     "linear_probe(image_features(models, x), truth)", "zero_shot"),
    ("x_seen[~seen]), seen_labels[~seen])", "x_seen), seen_labels)", "zero_shot"),
    ("image_size, 50_000)", 'image_size, 50_000, "validation")', "zero_shot"),
    ("(features), labels[:, a])", "(features), labels[:, 0])", "linear_probe"),
    ("by_judge}, unseen)", "by_judge})", "zero_shot"),
    ("K * words[chosen] + plain]", "K * words[chosen] + plain.flip(0)]", "training_with_words"),
    ("partial_true_of[:, plain]", "partial_true_of[:, plain.flip(0)]", "training_with_words"),
    ("(predicted == named)[other]", "(predicted == truth)[other]", "reads_words")]}


def find_all(word=""):
    """-> [(file, text, replacement, tests)], tests: [(file of tests, words)]; SystemExit if a text
    is not there once"""
    found = []
    for file, mutants in MUTANTS.items():
        source = (ROOT / file).read_text("utf-8")
        own = next(name for name in (Path(file).stem, Path(file).parent.name)
                   if (ROOT / f"tests/test_{name}.py").exists())
        for text, replacement, tests in mutants:
            if source.count(text) != 1 or text == replacement:
                raise SystemExit(f"{file}: {text!r} is there {source.count(text)} times, not once")
            parts = [part.rpartition(": ")[::2] for part in tests.split("; ")]
            if word in file or word in text:
                found.append((file, text, replacement,
                              [(name or own, words.split(", ")) for name, words in parts]))
    return found


def copy_tree(folder):
    """Copy all files of the work tree but those that git ignores, and link what lies beside it."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(command, cwd=ROOT, text=True).split("\0")[:-1]:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for found in ROOT.parent.glob("*/openai_clip"):   # the published vocabulary, for its tests
        (folder.parent / found.parent.name).symlink_to(found.parent)


@contextlib.contextmanager
def start_worker(folder):
    """-> the folder of a copy, and a process in it that runs tests"""
    copy_tree(folder)
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER], cwd=folder, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env={
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
    with process:   # which ends with its stdin
        yield folder, process


def run_tests(worker, tests):
    """Run tests [(file, words)] -> pytest's exit code: 0 if all pass, 1 if one fails"""
    _, process = worker
    for name, words in tests:
        arguments = [f"tests/test_{name}.py", "-xq", "-n0", "-k", " or ".join(words),
                     "-p", "no:cacheprovider"]
        print(json.dumps(arguments), file=process.stdin, flush=True)
        if code := int(process.stdout.readline()):
            return code
    return 0


def run_mutant(workers, file, text, replacement, tests):
    """Replace a text in one of the copies and run the tests -> exit code, what pytest printed"""
    worker = folder, _ = workers.get()
    source, out = (folder / file).read_text("utf-8"), folder.parent / "out.txt"
    (folder / file).write_text(source.replace(text, replacement), "utf-8")
    code, printed = run_tests(worker, tests), out.read_text("utf-8")
    (folder / file).write_text(source, "utf-8")
    out.unlink()
    workers.put(worker)
    return code, printed


def main(word=""):
    mutants, start, codes, workers = find_all(word), time.monotonic(), [], queue.Queue()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for i in range(WORKERS):
            workers.put(stack.enter_context(start_worker(folder / str(i) / "copy")))
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(WORKERS))
        run = lambda mutant: run_mutant(workers, *mutant)
        words_of = collections.defaultdict(set)
        for name, words in (part for *_, tests in mutants for part in tests):
            words_of[name].update(words)
        unchanged = [("LICENSE", "", "", [test]) for test in words_of.items()]
        for code, printed in pool.map(run, unchanged):
            if code:
                raise SystemExit(f"without a mutant:\n{printed}")
        for (file, text, replacement, tests), (code, printed) in zip(
                mutants, pool.map(run, mutants)):
            killed = code in (1, TOO_SLOW)
            codes.append(1 if killed else code)
            result = "killed  " if killed else f"ERROR {code}\n{printed}" if code else "SURVIVED"
            where = "; ".join(f"{name}: {', '.join(words)}" for name, words in tests)
            print(f"{result} {file}: {text.strip()!r} -> {replacement.strip()!r} ({where})",
                  flush=True)
    killed = codes.count(1)
    print(f"{killed} of {len(codes)} mutants killed ({killed / len(codes):.1%}) in "
          f"{time.monotonic() - start:.0f} s")
    sys.exit(killed < LEAST * len(codes) or not set(codes) <= {0, 1})


if __name__ == "__main__":
    main(*sys.argv[1:])
