"""Samples that begin with files: pictures, clips, a last frame, a clip to translate; what is refused."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from penstock.lightning_modules.autoregressive_module import unfinished
from penstock.lightning_modules.decoding_bar import decoding_bar
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.inverse import Jacobi, Sequential, Trace
from penstock.lightning_modules.nets.autoencoder import Identity
from penstock.lightning_modules.nets.flow_denoiser import FlowDenoiser
from penstock.lightning_modules.nets.starflow import STARFlow as Net
from penstock.lightning_modules.nets.text_encoder import HashedText
from penstock.lightning_modules.starflow_v import STARFlowV
from penstock.lightning_modules.video_prefix import last_frame_first, read_clip

SIDE = 4


def model(frames=4, **options):
    torch.manual_seed(0)
    text_dim = 32 if options.get("text") else 0
    net = Net((frames, 1, SIDE, SIDE), dim=32, depths=(1, 1), head_dim=32, patch=2, text_dim=text_dim)
    denoiser = FlowDenoiser(4, 32, 1, 32, text_dim, side=2)
    for weight in (*net.parameters(), *denoiser.parameters()):
        weight.data += 0.1 * torch.randn_like(weight)
    return STARFlowV(net, torch.optim.AdamW, denoiser, **{"inverse": Sequential(), **options})


@pytest.fixture
def files(tmp_path):
    """Grey pictures of levels 0, 40, 80 ... in a folder of frames, and one picture of level 255."""
    folder = tmp_path / "clip"
    folder.mkdir()
    for n in range(3):
        Image.new("RGB", (SIDE, SIDE), (40 * n,) * 3).save(folder / f"{n}.png")
    Image.new("RGB", (SIDE, SIDE), (255,) * 3).save(tmp_path / "white.png")
    return {"clip": str(folder), "white": str(tmp_path / "white.png")}


def grey(level):
    return torch.full((1, SIDE, SIDE), level / 127.5 - 1)


def sampled(flow, n=2, **options):
    with torch.inference_mode():
        return flow.sample(n, generator=torch.Generator().manual_seed(1), **options)


def same(frames, *levels):
    for frame, level in zip(frames, levels, strict=True):
        torch.testing.assert_close(frame, grey(level), atol=1e-5, rtol=0)


@pytest.mark.parametrize("inverse", [Sequential(), Jacobi(8, tolerance=1e-2)])
def test_what_is_given_comes_back_and_the_rest_follows_from_it(files, inverse):
    flow = model(inverse=inverse)
    free, still, clip = sampled(flow), sampled(flow, image=files["white"]), sampled(flow, video=files["clip"])
    assert free.shape == still.shape == clip.shape == (2, 4, 1, SIDE, SIDE)
    for sample in still:
        same(sample[:1], 255)
    for sample in clip:
        same(sample[:3], 0, 40, 80)
    assert (still[:, 1:] - free[:, 1:]).abs().max() > 1e-3
    assert (still[0, 1:] - still[1, 1:]).abs().max() > 1e-3


def test_a_last_frame_is_shown_last_and_a_source_is_not_shown(files):
    flow = model()
    ended = sampled(flow, last=files["white"], image=files["clip"])
    same(ended[0, [0, 3]], 0, 255)
    translated = sampled(flow, source=files["clip"])
    assert translated.shape == (2, 2, 1, SIDE, SIDE)


def test_a_source_is_half_of_the_sequence_and_may_be_clips(files):
    flow = model()
    clip = torch.stack([grey(0), grey(40)])
    assert torch.equal(sampled(flow, source=files["clip"]), sampled(flow, source=clip.expand(2, -1, -1, -1, -1)))
    two = torch.stack([clip, -clip])
    made, other = sampled(flow, source=two), sampled(flow, source=two[[0, 0]])
    assert torch.equal(made[0], other[0])
    assert (made[1] - other[1]).abs().max() > 1e-3
    with pytest.raises(UserError, match="clip: found 3 frames, expected at least 4"):
        sampled(model(8), source=files["clip"])


def test_frames_of_files_are_taken_as_asked_for(files):
    flow = model()
    same(sampled(flow, video=files["clip"], given=2)[0, :2], 0, 40)
    at_half_rate = read_clip(Path(files["clip"]), (1, SIDE, SIDE), None, 2.0)
    same(at_half_rate, 0, 40, 80)
    with pytest.raises(UserError, match="clip: found 3 frames at 2 fps, expected at least 4"):
        read_clip(Path(files["clip"]), (1, SIDE, SIDE), 4, 2.0)
    gif = Path(files["clip"]).parent / "a.gif"
    frames = [Image.new("L", (SIDE, SIDE), 40 * n) for n in range(4)]
    frames[0].save(gif, save_all=True, append_images=frames[1:], duration=100)
    same(read_clip(gif, (1, SIDE, SIDE), None, 5.0), 0, 80)
    same(sampled(flow, video=str(gif), given=2, fps=5.0)[0, :2], 0, 80)


def test_predictions_follow_their_sources():
    flow, source = model(), torch.stack([torch.stack([grey(0), grey(40)]), torch.stack([grey(90), grey(9)])])
    batch = {"index": torch.arange(2), "source": source, "video": source}
    with torch.inference_mode():
        found, other = flow.predict_step(batch, 0), flow.predict_step({**batch, "source": source.flip(0)}, 0)
    assert found["video"].shape == (2, 2, 1, SIDE, SIDE)
    assert torch.equal(found["source"], source)
    assert (found["video"] - other["video"]).abs().max() > 1e-3


class Pairs:
    """Clips of two frames with sources."""

    shape, num_classes, sourced = (2, 1, SIDE, SIDE), 0, True


@pytest.mark.parametrize("text", [None, HashedText(32)])
def test_a_network_of_pairs_has_twice_the_frames_of_the_data(text):
    right, wrong = model(4, text=text), model(2, text=text)
    right.fits(Pairs())
    line = r"model\.net\.shape: found \(2, 1, 4, 4\), expected \(4, 1, 4, 4\), .*twice the frames: a source"
    with pytest.raises(UserError, match=line):
        wrong.fits(Pairs())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"image": "white", "frames": 1}, r"frames=1: image=.*white\.png leaves none to make; expected 2 or more"),
        ({"image": "white", "last": "white", "frames": 2}, r"frames=2: image=.* and last=.* leaves none .* 3 or more"),
        ({"frames": 0}, "frames=0: expected a whole number of 1 or more"),
        ({"frames": -3}, "frames=-3: expected a whole number of 1 or more"),
        ({"guidance": -1.0}, "guidance=-1: expected 0 or more"),
        ({"video": "clip", "frames": 3}, "video=.*clip: 3 frames, expected at most 2 .*; given=N takes the first N"),
        ({"video": "clip", "given": 0}, "given=0: expected a number of frames of video=FILE, at least 1"),
        ({"image": "white", "given": 1}, "given=1: expected a number of frames of video=FILE"),
        ({"video": "clip", "given": 5}, "clip: found 3 frames, expected at least 5"),
        ({"video": "clip", "fps": 0.0}, r"fps=0\.0: expected frames per second above 0"),
        ({"last": "white", "frames": 9}, "last=.*: 9 frames, expected at most 4, the window"),
        ({"image": "white", "video": "clip"}, "image=.* and video=.*: expected one of them"),
        ({"source": "clip", "last": "white"}, "source=.* and last=.*: expected one of them"),
        ({"image": "absent"}, "absent: no such file or folder"),
    ],
)
def test_refuses_what_leaves_nothing_to_make(files, words, line):
    given = {key: files.get(value, value) for key, value in words.items()}
    with pytest.raises(UserError, match=line):
        sampled(model(), **given)


def test_the_frame_that_leads_is_encoded_on_its_own():
    video, seen = torch.arange(9.0).reshape(1, 9, 1, 1, 1), []

    class Every(Identity):
        def encode(self, image, noise=None):
            seen.append((image.flatten().tolist(), noise.flatten().tolist()))
            return image[:, ::4]

    found = last_frame_first(video, Every(), 4, torch.tensor([7.0, 8, 9]).reshape(1, 3, 1, 1, 1))
    assert seen == [([5.0], [7.0]), ([0.0, 1, 2, 3, 4], [8.0, 9])]
    assert found.flatten().tolist() == [5, 0, 4]


class Fours(Identity):
    """Frames in fours after the first."""

    frame_factor = 4

    def encode(self, image, noise=None):
        return image[:, ::4]

    def decode(self, latent):
        return latent.repeat_interleave(4, 1)[:, 3:]


def test_frames_that_an_autoencoder_drops_are_refused_or_told(tmp_path):
    for n in range(10):
        Image.new("L", (SIDE, SIDE), 20 * n).save(tmp_path / f"{n}.png")
    flow = model()
    flow.autoencoder = Fours()
    with pytest.raises(UserError, match=r"given=6: expected 1 more than a multiple of 4, .*did you mean 5 or 9\?"):
        sampled(flow, video=str(tmp_path), given=6)
    with pytest.warns(UserWarning, match="the last 1 of 10 frames are left out; model.autoencoder takes 1 more than"):
        whole = sampled(flow, video=str(tmp_path))
    assert torch.equal(whole, sampled(flow, video=str(tmp_path), given=9))
    assert whole.shape[1] == 13
    assert sampled(flow, last=str(tmp_path / "0.png")).shape[1] == 10


def test_a_bar_appears_when_decoding_begins(files, capfd):
    flow = model()
    with pytest.raises(UserError), decoding_bar(flow, 2, -3):
        sampled(flow, frames=-3)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("sourced", "told"), [(None, 0), (True, 0), (False, 1)])
def test_a_source_for_a_model_that_never_saw_one_is_told(sourced, told, files, recwarn):
    flow = model()
    flow.sourced = sourced
    sampled(flow, source=files["clip"])
    sampled(flow, source=torch.stack([grey(0), grey(40)]).expand(2, -1, -1, -1, -1))
    assert sum("its data had no sources" in str(one.message) for one in recwarn) == told


@pytest.mark.parametrize(("share", "told"), [(0.0, 1), (0.2, 0)])
def test_a_last_frame_for_a_model_that_never_saw_one_is_told(share, told, files, recwarn):
    sampled(model(last_frame=share), last=files["white"])
    assert sum("model.last_frame=0" in str(one.message) for one in recwarn) == told


def test_reads_colours_as_the_model_has_them(files):
    assert read_clip(Path(files["clip"]), (3, 2, 2)).shape == (3, 3, 2, 2)


def test_a_bar_counts_every_token_of_all_blocks(capfd):
    flow = model(inverse=Jacobi(3, tolerance=1e-3))
    with decoding_bar(flow, 2):
        sampled(flow)
    assert flow.told is None
    assert f"{2 * 4 * 4 * 2:.1f}/{2 * 4 * 4 * 2:.1f}" in capfd.readouterr().err
    with decoding_bar(object(), 2):
        pass
    assert capfd.readouterr().err == ""


def test_says_how_far_chunks_were_from_standing_still():
    done, short = Trace([3], [1e-6], 0), Trace([5, 2], [0.04, 1e-5], 1)
    assert unfinished([done]) == ""
    line = unfinished([done, short])
    assert "1 of 3 chunks" in line
    assert "after 5 sweeps the last one moved them by 0.2 of their size" in line
    with pytest.raises(UserError, match="samples are not finite"):
        unfinished([Trace([1], [float("nan")], 0)])
    flow = model(inverse=Jacobi(16, tolerance=1e-9, max_sweeps=1))
    with pytest.warns(UserWarning, match="did not reach the tolerance"):
        sampled(flow)
