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
from penstock.lightning_modules.starflow_v import STARFlowV
from penstock.lightning_modules.video_prefix import last_frame_first, read_clip

SIDE = 4


def model(frames=4, **options):
    torch.manual_seed(0)
    net = Net((frames, 1, SIDE, SIDE), dim=32, depths=(1, 1), head_dim=32, patch=2)
    denoiser = FlowDenoiser(4, 32, 1, 32, side=2)
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
    assert translated.shape == (2, 1, 1, SIDE, SIDE)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"image": "white", "frames": 1}, r"image=.*white\.png: 1 frames, expected at most 0"),
        ({"video": "clip", "frames": 3}, "video=.*clip: 3 frames, expected at most 2"),
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


def test_reads_colours_as_the_model_has_them(files):
    assert read_clip(Path(files["clip"]), (3, 2, 2), False).shape == (3, 3, 2, 2)


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
