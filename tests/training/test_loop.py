import functools
import math
from pathlib import Path

import pytest
import torch

from ddim_fast import Sampler, UNet, UNetConfig
from ddim_fast.data.images import ImageSet
from ddim_fast.training.loop import Trainer, TrainingOptions

TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "layers_per_block": 1,
    "attention_resolutions": (4,),
    "norm_num_groups": 4,
}
# A single timestep with hardly any noise: what the network sees are the images themselves.
NOISELESS = {"num_train_timesteps": 1, "beta_start": 1e-8, "beta_end": 1e-8}


def make_model(seed: int = 0, **fields) -> UNet:
    torch.manual_seed(seed)
    return UNet(UNetConfig(**{**TINY, "dropout": 0.0, **fields}))


def make_data(count: int, labels=None, channels: int = 1) -> ImageSet:
    images = torch.randint(0, 256, (count, channels, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return ImageSet(images, None if labels is None else torch.tensor(labels))


def make_trainer(data: ImageSet, model: UNet | None = None, processes=None, held_out=None, **options) -> Trainer:
    options = {"steps": 5, "batch_size": 4, "lr": 1e-3, "warmup": 0, "flip": False, **options}
    return Trainer(model or make_model(), data, TrainingOptions(**options), processes, held_out)


def run(trainer: Trainer, steps: int | None = None) -> list:
    """Take ``steps`` steps, or all."""
    return [step for _, step in zip(range(steps if steps is not None else 10**9), trainer.run(), strict=False)]


def record_inputs(trainer: Trainer) -> list:
    """A list that fills with the (images, timesteps, labels) of each step."""
    seen = []
    trainer.model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs)))
    return seen


def to_bytes(x: torch.Tensor) -> torch.Tensor:
    return ((x + 1) * 127.5).round().to(torch.uint8)


def assert_equal_states(one, other) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_the_loss_falls():
    images = torch.zeros(16, 1, 8, 8, dtype=torch.uint8)
    images[:8, :, :, :4] = 255
    images[8:, :, :4, :] = 255
    trainer = make_trainer(ImageSet(images, None), steps=60, batch_size=16, lr=5e-3)
    losses = torch.stack([step.loss for step in run(trainer)])
    assert losses[0] == pytest.approx(1, abs=0.15)  # a fresh network says zero, and noise has variance one
    assert losses[-10:].mean() < 0.5 * losses[:5].mean()


def test_resuming_equals_never_stopping_bit_for_bit(tmp_path):
    data = make_data(10, labels=[i % 3 for i in range(10)])
    fields = {"num_classes": 3, "dropout": 0.2}
    options = {"steps": 7, "flip": True, "label_dropout": 0.3, "lr_schedule": "cosine", "warmup": 2, "ema": 0.9}
    whole = make_trainer(data, make_model(0, **fields), **options)
    losses = [float(step.loss) for step in run(whole)]

    first = make_trainer(data, make_model(0, **fields), **options)
    before = [float(step.loss) for step in run(first, 3)]
    first.save(tmp_path)
    second = make_trainer(data, make_model(1, **fields), **options)
    second.load(tmp_path)
    assert second.step == 3
    torch.manual_seed(999)
    after = run(second)

    assert [step.step for step in after] == [4, 5, 6, 7]
    assert before + [float(step.loss) for step in after] == losses
    assert_equal_states(second.model.state_dict(), whole.model.state_dict())
    assert_equal_states(second.ema.state_dict(), whole.ema.state_dict())
    for i, state in whole.optimizer.state_dict()["state"].items():
        assert_equal_states(second.optimizer.state_dict()["state"][i], state)


def test_seeds_make_different_runs():
    losses = [[float(s.loss) for s in run(make_trainer(make_data(10), seed=seed))] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("count,batch_size", [(10, 4), (12, 4), (3, 7), (1, 4)])
def test_each_image_is_seen_once_an_epoch(count, batch_size):
    epochs = 6
    trainer = make_trainer(
        make_data(count), make_model(**NOISELESS), steps=-(-epochs * count // batch_size), batch_size=batch_size
    )
    seen = record_inputs(trainer)
    run(trainer)
    assert all(len(x) == batch_size for x, _, _ in seen)
    images = to_bytes(torch.cat([x for x, _, _ in seen]))
    orders = []
    for epoch in range(epochs):
        part = images[epoch * count : (epoch + 1) * count]
        order = [next(i for i in range(count) if torch.equal(trainer.data.images[i], image)) for image in part]
        assert sorted(order) == list(range(count))
        orders.append(tuple(order))
    if count >= 10:
        assert len(set(orders)) == epochs


def test_labels_belong_to_their_images():
    data = make_data(10, labels=[3, 1, 4, 1, 5, 0, 2, 6, 5, 3])
    trainer = make_trainer(data, make_model(num_classes=7, **NOISELESS), label_dropout=0.0)
    seen = record_inputs(trainer)
    run(trainer)
    for x, _, labels in seen:
        for image, label in zip(to_bytes(x), labels, strict=True):
            assert label in [data.labels[i] for i in range(10) if torch.equal(data.images[i], image)]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_labels_are_dropped_to_the_null_class(share):
    trainer = make_trainer(
        make_data(8, labels=[1] * 8), make_model(num_classes=3), steps=4, batch_size=100, label_dropout=share
    )
    seen = record_inputs(trainer)
    run(trainer)
    labels = torch.cat([labels for _, _, labels in seen])
    assert set(labels.tolist()) <= {1, 3}
    assert float((labels == 3).float().mean()) == pytest.approx(share, abs=0.06 if 0 < share < 1 else 0)


def test_an_unconditional_network_gets_no_labels():
    trainer = make_trainer(make_data(8, labels=[1] * 8), steps=1)
    seen = record_inputs(trainer)
    run(trainer)
    assert seen[0][2] is None


@pytest.mark.parametrize("flip", [True, False])
def test_half_of_the_images_are_mirrored(flip):
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[..., :3, :2] = 255
    trainer = make_trainer(ImageSet(image, None), make_model(**NOISELESS), steps=3, batch_size=100, flip=flip)
    seen = record_inputs(trainer)
    run(trainer)
    images = to_bytes(torch.cat([x for x, _, _ in seen]))
    mirrored = (images == image.flip(3)).flatten(1).all(1)
    assert (mirrored | (images == image).flatten(1).all(1)).all()
    assert float(mirrored.float().mean()) == pytest.approx(0.5 if flip else 0, abs=0.1 if flip else 0)


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    options = {"steps": 12, "batch_size": 1, "lr": 1e-3, "warmup": 4}
    trainer = make_trainer(make_data(2), lr_schedule="cosine", **options)
    rates = []
    for step in trainer.run():
        rates.append(step.lr)
        assert trainer.optimizer.param_groups[0]["lr"] == step.lr
    cosine = [1e-3 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, *cosine], rel=1e-12)
    constant = run(make_trainer(make_data(2), lr_schedule="constant", **options))
    assert [s.lr for s in constant] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, *[1e-3] * 9], rel=1e-12)


def test_gradients_are_clipped_and_their_norm_reported():
    trainer = make_trainer(make_data(8), grad_clip=1e-3)
    for step in trainer.run():
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trainer.model.parameters() if p.grad is not None))
        assert float(step.grad_norm) > 1e-3
        assert norm == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_changes_no_weights(accumulate):
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images[5] = torch.nan
    trainer = make_trainer(ImageSet(images, None), accumulate=accumulate, steps=6)

    def state():
        moments = trainer.optimizer.state_dict()["state"]
        return {**trainer.model.state_dict(), **{f"{i} {k}": v for i, m in moments.items() for k, v in m.items()}}

    bad, before = 0, {}
    for step in trainer.run():
        if 5 in trainer.indices(step.step - 1):
            assert step.loss.isnan()
            assert_equal_states(state(), before)
            bad += 1
        else:
            assert step.loss.isfinite() and step.grad_norm.isfinite()
            assert not before or not torch.equal(state()["conv_out.bias"], before["conv_out.bias"])
        before = {name: tensor.clone() for name, tensor in state().items()}
    assert bad == 3  # once an epoch
    assert all(tensor.isfinite().all() for tensor in before.values())
    assert all(tensor.isfinite().all() for tensor in trainer.ema.state_dict().values())


def test_the_validation_loss_in_bfloat16_is_near_float32s():
    data, held_out = make_data(6, labels=[0, 1] * 3), make_data(8, labels=[0, 1] * 4)
    values = [
        make_trainer(data, make_model(num_classes=2), batch_size=6, held_out=held_out, bf16=bf16).validation_loss()
        for bf16 in (False, True)
    ]
    assert values[0] == pytest.approx(values[1], rel=0.01)


def test_the_validation_loss_is_that_of_the_averages_with_noise_that_stays():
    data, held_out = make_data(6, labels=[0, 1] * 3), make_data(70, labels=[0, 1] * 35)
    options = {"batch_size": 6, "steps": 4, "ema": 0.9, "held_out": held_out}
    trainers = [
        make_trainer(data, make_model(num_classes=2, dropout=0.5), seed=seed, accumulate=accumulate, **options)
        for seed, accumulate in ((0, 1), (1, 3))
    ]
    values = [trainer.validation_loss() for trainer in trainers]
    assert values[0] == trainers[0].validation_loss() == pytest.approx(values[1], rel=1e-6)
    assert values[0] == pytest.approx(1, abs=0.1)  # a fresh network says zero, and noise has variance one
    run(trainers[0])
    own = trainers[0].validation_loss()
    assert own < 0.99 * values[0]
    trainers[0].model.load_state_dict(trainers[0].ema.state_dict())
    assert trainers[0].validation_loss() == own
    with torch.no_grad():
        trainers[0].ema.shadow["conv_out.bias"] += 1
    assert trainers[0].validation_loss() > own + 0.5


def test_consistency_has_a_teacher():
    with pytest.raises(ValueError, match="consistency needs a teacher, the network as it was when the training began"):
        make_trainer(make_data(4), consistency=(999, 400))


def test_held_out_images_fit_the_network_too():
    with pytest.raises(ValueError, match=r"takes images of shape \(1, 8, 8\); the data has \(3, 8, 8\)"):
        make_trainer(make_data(4), held_out=make_data(4, channels=3))


def test_a_checkpoint_is_the_average_and_samples(tmp_path):
    trainer = make_trainer(make_data(8, labels=[0, 1] * 4), make_model(num_classes=2), ema=0.9)
    run(trainer)
    trainer.save(tmp_path / "new" / "run")
    assert {p.name for p in (tmp_path / "new" / "run").iterdir()} == {
        "config.json",
        "model.safetensors",
        "training_state.pt",
    }
    model = UNet.from_pretrained(tmp_path / "new" / "run")
    assert_equal_states(model.state_dict(), dict(trainer.ema.state_dict()))
    assert not torch.equal(model.conv_out.weight, trainer.model.conv_out.weight)
    images = Sampler(model, steps=3).sample(seeds=[0, 1], labels=[0, 1], guidance=2.0)
    assert images.shape == (2, 1, 8, 8) and images.isfinite().all()


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with a saved run."""
    trainer = make_trainer(make_data(4), steps=1)
    run(trainer)
    trainer.save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[:1000], lambda b: b"", lambda b: b"garbage"])
def test_a_damaged_training_state_is_one_clear_error(damage, saved):
    path = saved / "training_state.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError) as caught:
        make_trainer(make_data(4)).load(saved)
    assert str(caught.value) == f"{path}: not a whole training state"


def test_a_training_state_runs_no_code(saved):
    torch.save(Evil(saved / "touched"), saved / "training_state.pt")
    with pytest.raises(ValueError, match="not a whole training state"):
        make_trainer(make_data(4)).load(saved)
    assert not (saved / "touched").exists()


def test_the_training_state_of_another_network_is_one_clear_error(saved):
    other = UNet(UNetConfig(**{**TINY, "layers_per_block": 2}))
    with pytest.raises(ValueError, match=r"training_state\.pt: the training state of another network"):
        make_trainer(make_data(4), other).load(saved)
    whole = torch.load(saved / "training_state.pt", weights_only=True)
    narrow = {**whole["ema"], "conv_in.bias": torch.zeros(1)}  # which copy_ would broadcast
    moments = {**whole["optimizer"], "state": {0: {"step": 1}}}
    for content in (
        [1, 2],
        {},
        {"model": None},
        whole | {"ema": narrow},
        whole | {"optimizer": moments},
        whole | {"step": "x"},
    ):
        torch.save(content, saved / "training_state.pt")
        with pytest.raises(ValueError, match=r"training_state\.pt: the training state of another network"):
            make_trainer(make_data(4)).load(saved)


@pytest.mark.parametrize(
    "spoil,tensor",
    [
        (lambda state: state["model"]["conv_in.weight"], "conv_in.weight"),
        (lambda state: state["ema"]["conv_out.bias"], "conv_out.bias"),
        (lambda state: state["optimizer"]["state"][3]["exp_avg_sq"], "exp_avg_sq of parameter 3"),
    ],
)
def test_a_training_state_that_is_not_finite_is_refused(spoil, tensor, saved):
    state = torch.load(saved / "training_state.pt", weights_only=True)
    spoil(state).view(-1)[0] = torch.nan
    torch.save(state, saved / "training_state.pt")
    with pytest.raises(ValueError, match=rf"training_state\.pt: tensor '{tensor}' is not finite"):
        make_trainer(make_data(4)).load(saved)


def test_a_missing_training_state_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no training_state\.pt"):
        make_trainer(make_data(4)).load(tmp_path)


@pytest.mark.parametrize(
    "data,fields,message",
    [
        (make_data(4), {"sample_size": 16}, r"takes images of shape \(1, 16, 16\); the data has \(1, 8, 8\)"),
        (make_data(4), {"in_channels": 3}, r"takes images of shape \(3, 8, 8\); the data has \(1, 8, 8\)"),
        (make_data(4), {"num_classes": 3}, "class-conditional, but the data has no labels"),
        (make_data(4, [0, 1, 2, 3]), {"num_classes": 3}, r"labels must be in 0\.\.2; the data has 0\.\.3"),
        (make_data(4, [0, 1, -1, 2]), {"num_classes": 3}, r"labels must be in 0\.\.2; the data has -1\.\.2"),
    ],
)
def test_data_that_does_not_fit_the_network_is_refused(data, fields, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(data, make_model(**fields))


@pytest.mark.parametrize(
    "name,value",
    [
        ("steps", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", -1e-3),
        ("lr", math.inf),
        ("lr", math.nan),
        ("warmup", -1),
        ("lr_schedule", "linear"),
        ("ema", 1.0),
        ("ema", -0.1),
        ("accumulate", 0),
        ("skip_bad_steps", -1),
        ("grad_clip", 0.0),
        ("grad_clip", -1.0),
        ("grad_clip", math.nan),
        ("min_snr_gamma", 0.0),
        ("label_dropout", 1.5),
        ("label_dropout", -0.5),
    ],
)
def test_impossible_options_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*; got {value}|{name} must be .*; got '{value}'"):
        TrainingOptions(**{name: value})


def test_bf16_trains_float32_weights():
    trainer = make_trainer(make_data(8), bf16=True)
    for step in trainer.run():
        assert step.loss.dtype == torch.float32 and step.loss.isfinite() and step.grad_norm.isfinite()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    exact = run(make_trainer(make_data(8)))
    assert float(step.loss) != float(exact[-1].loss)
    assert float(step.loss) == pytest.approx(float(exact[-1].loss), rel=0.05)


@pytest.mark.slow
def test_compiled_training_equals_eager(monkeypatch):
    data = make_data(8, labels=[0, 1] * 4)
    options = {"steps": 2, "min_snr_gamma": 5.0}
    eager = run(make_trainer(data, make_model(num_classes=2), **options))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled = run(make_trainer(data, make_model(num_classes=2), compile=True, **options))
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_is_a_copy_that_later_steps_do_not_change(tmp_path):
    trainer = make_trainer(make_data(8), ema_snapshots=2)
    run(trainer, 2)
    trainer.save(tmp_path / "at-once")
    checkpoint = trainer.checkpoint()
    run(trainer, 2)
    checkpoint.write(tmp_path / "later")
    for name in ("training_state.pt", "model.safetensors", "config.json"):
        assert (tmp_path / "later" / name).read_bytes() == (tmp_path / "at-once" / name).read_bytes()
    trainer.save(tmp_path / "now")
    assert (tmp_path / "now" / "training_state.pt").read_bytes() != (tmp_path / "later" / "training_state.pt").read_bytes()
