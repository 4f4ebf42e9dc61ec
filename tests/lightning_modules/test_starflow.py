"""STARFlow and STARFlow-V as methods: likelihood, noise, sampling, the score that the denoiser learns, updates."""

import math

import pytest
import torch

from penstock.kernels.philox import Draws
from penstock.lightning_modules.autoregressive_module import CONSTANT, mean_squares
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.affine import ScoreGuidance
from penstock.lightning_modules.flow.inverse import Jacobi, Sequential
from penstock.lightning_modules.flow.rollout import chunks, windows
from penstock.lightning_modules.nets.flow_denoiser import FlowDenoiser
from penstock.lightning_modules.nets.starflow import STARFlow as Net
from penstock.lightning_modules.nets.text_encoder import TextEncoder
from penstock.lightning_modules.starflow import STARFlow
from penstock.lightning_modules.starflow_v import STARFlowV, leave_out

SMALL = {"dim": 32, "depths": (1, 1, 2), "head_dim": 32}


def shaken(net, seed=0):
    """`net` with weights that make it no identity."""
    generator = torch.Generator().manual_seed(seed)
    for weight in net.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return net


def images(**options):
    net = shaken(Net((1, 4, 4), num_classes=3, patch=2, **SMALL))
    return STARFlow(net, torch.optim.AdamW, **{"inverse": Sequential(), "denoise": False, **options})


def clips(denoiser=True, frames=3, depth=2, **options):
    net = shaken(Net((frames, 2, 2, 3), **SMALL))
    denoiser = shaken(FlowDenoiser(2, 32, depth, 32, side=2, window=2)) if denoiser else None
    return STARFlowV(net, torch.optim.AdamW, denoiser, **{"inverse": Sequential(), **options})


def batch(n=4):
    generator = torch.Generator().manual_seed(5)
    return {
        "image": torch.randn(n, 1, 4, 4, generator=generator),
        "label": torch.arange(n) % 3,
        "index": torch.arange(n),
    }


def draws(n=4):
    return Draws(0, 0, torch.arange(n))


def test_calls_vary_where_a_block_is_swept():
    assert not images().calls_vary
    assert not images(shallow=[Sequential(), Sequential()]).calls_vary
    assert images(inverse=None).calls_vary
    assert images(shallow=Jacobi()).calls_vary
    assert images(shallow=[Sequential(), Jacobi()]).calls_vary


def test_a_negative_weight_of_guidance_is_refused():
    with pytest.raises(UserError, match=r"guidance=-0\.5: expected 0 or more"):
        images(guidance=ScoreGuidance(1.0)).sample(2, cond=torch.tensor([0, 1]), guidance=-0.5)


def test_density_is_that_of_the_change_of_variables():
    flow, x = images().double(), batch()["image"].double()
    label = torch.tensor([2])

    def noise(one):
        return flow.net(one.reshape(1, 1, 4, 4), label).z.flatten()

    one = x[0].flatten()
    jacobian = torch.autograd.functional.jacobian(noise, one)
    expected = -0.5 * noise(one).square().sum() - 8 * math.log(2 * math.pi) + torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(flow.log_prob(x[:1], cond=label)[0], expected)


def test_losses_are_nats_a_dimension_of_noisy_data_and_the_penalty():
    flow, given = images(noise=0.5, penalty=0.0, condition_dropout=0.0), batch()
    noisy = given["image"] + 0.5 * draws().normal("noise", (1, 4, 4))
    expected = -flow.log_prob(noisy, cond=given["label"]) / 16
    torch.testing.assert_close(flow.losses(given, draws()), expected)
    flow.penalty = 0.3
    squares = mean_squares(flow.net(noisy, given["label"]))
    torch.testing.assert_close(flow.losses(given, draws()), expected + 0.3 * squares)
    assert pytest.approx(0.9189385) == CONSTANT


def test_dropped_conditions_are_no_class():
    flow, given = images(noise=0.0, condition_dropout=1.0), batch()
    torch.testing.assert_close(
        flow.losses(given, draws()), -flow.log_prob(given["image"]) / 16 + 1e-4 * mean_squares(flow.net(given["image"]))
    )


@torch.no_grad()
def test_samples_are_the_inverse_by_any_inverse_and_depend_on_the_generator():
    flow, label = images(noise=0.0), torch.tensor([0, 1, 2])
    first, again = (flow.sample(3, cond=label, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert flow.nfe == 3 * 4
    z = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(flow.net(first, label).z, z, atol=1e-5, rtol=1e-5)
    flow.inverse = Jacobi(chunk=4, tolerance=0)
    torch.testing.assert_close(flow.sample(3, cond=label, generator=torch.Generator().manual_seed(1)), first)
    flow.sample(3, steps=1, cond=label)
    assert flow.nfe == 3
    guided = flow.sample(3, cond=label, guidance=2.0, generator=torch.Generator().manual_seed(1))
    flow.guidance = ScoreGuidance(2.0)
    assert torch.equal(flow.sample(3, cond=label, generator=torch.Generator().manual_seed(1)), guided)
    assert (guided - first).abs().max() > 1e-3
    with pytest.raises(UserError, match="takes no text"):
        flow.sample(1, prompt="a")


def test_tweedie_takes_a_step_along_the_gradient_inside_inference_mode():
    flow, x = images(noise=0.4), batch()["image"]
    noisy = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(flow.log_prob(noisy, cond=batch()["label"]).sum(), noisy)
    with torch.inference_mode():
        found = flow.tweedie(x.clone(), batch()["label"].clone())
    torch.testing.assert_close(found, x + 0.16 * score)


def stepped(flow, given, task="plain", factor=1.0):
    """Gradients of the flow and of the denoiser after a training step whose loss is multiplied before it goes back."""
    flow._trainer = type("Trainer", (), {"log_every_n_steps": 100, "current_epoch": 0, "global_step": 0})()
    flow.task = lambda batch, batch_idx: task
    flow.zero_grad()
    (factor * flow.training_step(given, 0)).backward()
    return [[p.grad for p in net.parameters()] for net in (flow.net, flow.denoiser)]


@pytest.mark.parametrize(("penalty", "factor"), [(0.0, 1.0), (3.0, 1.0), (0.0, 256.0)])
def test_the_denoiser_learns_tweedies_step_and_the_flow_its_likelihood_alone(penalty, factor):
    flow = clips(noise=0.5, penalty=penalty)
    given = {"video": torch.randn(4, 3, 2, 2, 3, generator=torch.Generator().manual_seed(0)), "index": torch.arange(4)}
    of_flow, of_denoiser = stepped(flow, given, factor=factor)
    flow.zero_grad()
    (factor * flow.losses(given, draws()).mean()).backward()
    x, _ = flow.noisy(given, draws())
    step = x - flow.tweedie(x)
    loss = (flow.score(x, None) - step / 0.3).square().mean()
    (factor * loss).backward()
    torch.testing.assert_close(flow.matching.loss, loss.detach(), rtol=1e-4, atol=0)
    for found, net in ((of_flow, flow.net), (of_denoiser, flow.denoiser)):
        for grad, parameter in zip(found, net.parameters(), strict=True):
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-5 * factor)


def test_steps_train_clips_without_their_first_frame_and_after_their_last_with_the_captions_tag():
    video = torch.randn(2, 3, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    given, flow = {"video": video, "index": torch.arange(2)}, clips(noise=0.0)
    last = flow.data({**given, "task": "last"}, draws(2))
    assert torch.equal(last, video[:, [2, 0, 1]])
    _, without = stepped(flow, given, "extend")
    _, expected = stepped(flow, {**given, "video": video[:, 1:]})
    for one, other in zip(without, expected, strict=True):
        torch.testing.assert_close(one, other)
    both = flow.data({**given, "source": -video}, draws(2))
    assert torch.equal(both, torch.cat([-video, video], 1))
    with pytest.raises(UserError, match="last_frame: batches hold latents"):
        flow.data({"latent": video, "task": "last"}, draws(2))


def test_tasks_come_in_their_shares_and_alike_on_all_ranks():
    flow = clips(first_frame_dropout=0.25, last_frame=0.5)
    flow._trainer = type("Trainer", (), {"current_epoch": 3})()
    tasks = [flow.task({"video": torch.zeros(1, 3, 2, 2, 3)}, step) for step in range(400)]
    shares = [tasks.count(task) / 400 for task in ("plain", "extend", "last")]
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.06)
    assert tasks == [flow.task({"latent": torch.zeros(5, 3, 2, 2, 3)}, step) for step in range(400)]
    assert {flow.task({"image": torch.zeros(1, 2, 2, 3)}, step) for step in range(20)} == {"plain"}


class Words(TextEncoder):
    """Remembers what it was asked for; images are marked."""

    dim = 32

    def __init__(self, mark=""):
        self.mark, self.seen = mark, []

    def __call__(self, texts, device="cpu"):
        self.seen.append([self.mark + text for text in texts])
        return torch.full((len(texts), 2, 32), float(len(self.mark)))

    def of_images(self):
        return Words("image of ")


def prompted(**options):
    net = shaken(Net((3, 2, 2, 3), text_dim=32, **SMALL))
    flow = STARFlowV(net, torch.optim.AdamW, text=Words(), inverse=Sequential(), **options)
    net.null_text = torch.ones(2, 32)
    return flow


def test_captions_are_tagged_by_task_and_told_of_images():
    flow = prompted()
    text, video = {"text": ["a dog", "a cat"]}, {"video": torch.zeros(2, 3, 2, 2, 3)}
    flow.condition({**text, **video, "task": "extend"})
    flow.condition({**text, **video, "source": video["video"]})
    flow.condition({**text, **video})
    expected = [[f"{tag}a dog", f"{tag}a cat"] for tag in ("(extend) ", "(v2v) ", "")]
    assert flow.prompted.text.seen == expected
    images = {**text, "image": torch.zeros(2, 2, 2, 3)}
    cond = flow.condition(images)
    told = flow._prompted_of(images).text
    assert told.seen == [["image of a dog", "image of a cat"]]
    dropped = flow.dropped(cond, torch.tensor([True, False]), images)
    assert told.seen[1:] == [["image of "]]
    assert torch.equal(dropped, cond)
    ones = torch.ones(2, 2, 32)
    assert flow.dropped(ones, torch.tensor([True, False]), video)[:, 0, 0].tolist() == [0, 1]


@torch.no_grad()
def test_windows_after_the_first_are_of_clips_that_go_on():
    flow = prompted(window=2, context=1, noise=0.0)
    flow.sample(2, prompt="a dog", frames=4, generator=torch.Generator().manual_seed(0))
    assert flow.prompted.text.seen == [["a dog"] * 2, ["(extend) a dog"] * 2]
    untrained = prompted(window=2, context=1, noise=0.0, first_frame_dropout=0.0)
    untrained.sample(2, prompt="a dog", frames=4)
    assert untrained.prompted.text.seen == [["a dog"] * 2]
    z = torch.randn(1, 4, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    first, other = torch.zeros(1, 2, 32), torch.ones(1, 2, 32)
    plain, later = flow.decode(z, cond=first), flow.decode(z, cond=first, later=other)
    assert torch.equal(plain[:, :2], later[:, :2])
    assert (plain[:, 2:] - later[:, 2:]).abs().max() > 1e-4


@torch.no_grad()
def test_clips_are_cleaned_from_an_untouched_copy_and_see_one_frame_ahead():
    flow, x = clips(depth=1), torch.randn(2, 11, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    whole = x - 0.3 * flow.score(x, None)
    flow.window = 8
    torch.testing.assert_close(flow.clean(x), whole, atol=1e-5, rtol=1e-5)
    changed = x.clone()
    changed[:, 6] += 1
    moved = (flow.clean(changed) - flow.clean(x)).abs().amax((0, 2, 3, 4)) > 0
    assert moved.tolist()[:6] == [False] * 5 + [True]


@torch.no_grad()
def test_long_clips_begin_like_short_ones_and_with_the_known_frames():
    flow = clips(False, window=3, context=2, noise=0.0)
    z = torch.randn(2, 6, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    long, short = flow.decode(z), flow.decode(z[:, :3])
    torch.testing.assert_close(long[:, :3], short, atol=1e-5, rtol=1e-5)
    again = flow.decode(z, known=long[:, :1])
    torch.testing.assert_close(again, long, atol=1e-4, rtol=1e-4)
    assert torch.equal(again[:, :1], long[:, :1])


def test_windows_and_chunks_cover_every_frame_once():
    assert windows(41, 21, 16)[:2] == [(0, 0, 21), (5, 16, 26)]
    assert windows(41, 21, 16)[-1] == (20, 16, 41)
    for total, chunk, behind, ahead in ((5, 9, 3, 1), (41, 21, 10, 1), (12, 4, 2, 1), (12, 3, 1, 0)):
        found = chunks(total, chunk, behind, ahead)
        assert [first for _, first, _, _ in found] == [0, *[last for _, _, last, _ in found[:-1]]]
        assert found[-1][2:] == (total, total)
        assert all(end - start <= chunk and first - start <= behind for start, first, _, end in found)
        assert all(end == total or end - last == ahead for _, _, last, end in found)
    with pytest.raises(ValueError, match="windows of 3 frames, 3 known"):
        windows(5, 3, 3)
    with pytest.raises(ValueError, match="chunks of 3 frames, expected more than 2 before"):
        chunks(9, 3, 2, 1)


@pytest.mark.parametrize("fused", [True, False])
def test_an_update_that_is_left_out_changes_nothing(fused):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)

    def step(wanted):
        optimizer.zero_grad()
        net(torch.ones(1, 3)).sum().backward()
        leave_out(optimizer, torch.tensor(wanted))
        optimizer.step()
        states = [s for p in net.parameters() for s in optimizer.state[p].values()]
        return [p.detach().clone() for p in net.parameters()] + [torch.as_tensor(s).clone() for s in states]

    before = step(False)
    assert all(torch.equal(a, b) for a, b in zip(before, step(True)))
    assert not all(torch.equal(a, b) for a, b in zip(before, step(False)))


@pytest.mark.parametrize(("step", "size", "expected"), [(0, 9.0, None), (5, 9.0, 1.0), (5, 0.01, 0.0)])
def test_large_updates_are_left_out_after_a_while_and_told(step, size, expected, monkeypatch):
    flow, told = clips(skip_after=5), {}
    flow._trainer = type("Trainer", (), {"log_every_n_steps": 1, "global_step": step})()
    monkeypatch.setattr(flow, "log", lambda name, value: told.update({name: float(value)}))
    optimizer = flow.configure_optimizers()
    before = [weight.detach().clone() for weight in flow.net.parameters()]
    for weight in flow.parameters():
        weight.grad = torch.full_like(weight, size / weight.numel())
    flow.configure_gradient_clipping(optimizer, 1.0)
    optimizer.step()
    unchanged = all(torch.equal(a, b) for a, b in zip(before, flow.net.parameters()))
    assert told == ({} if expected is None else {"train/left_out": expected})
    assert unchanged == (expected == 1.0)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: images(noise=-1.0), "noise=-1.0"),
        (lambda: images(condition_dropout=2.0), "condition_dropout=2.0"),
        (lambda: images(prompts=["a"]), "give text, too"),
        (lambda: clips(first_frame_dropout=1.5), "first_frame_dropout=1.5"),
        (lambda: clips(window=3, context=3), "context=3: expected 1 to 2 frames"),
    ],
)
def test_options_out_of_range(make, line):
    with pytest.raises(ValueError, match=line):
        make()
