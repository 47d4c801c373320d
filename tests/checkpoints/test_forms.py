"""Every form of a single file gives the same model; the report counts the tensors left out."""

import dataclasses

import pytest
import torch
from checkpoint_files import RECORDED, TEXT, UNET, VAE, add, changed, write_files

import model
import text
import vae
from checkpoints.names import configs_of, names_in_file, text_config
from checkpoints.safetensors_file import load_safetensors
from checkpoints.weights import load_pipeline
from pipeline import Sampling


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def state(pipeline):
    parts = ("unet", "vae", "text_encoder")
    return {f"{part}.{name}": tensor for part in parts
            for name, tensor in getattr(pipeline, part).state_dict().items()}


def assert_same(a, b):
    a, b = state(a), state(b)
    assert list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# Names and sizes


def full_size(family, **options):
    """The networks of Stable Diffusion, without memory."""
    autoencoder = dataclasses.replace(vae.PRESETS["sd"], **options)
    with torch.device("meta"):
        return {"unet": model.UNet(model.PRESETS[family]),
                "vae": vae.AutoencoderKL(autoencoder),
                "text_encoder": text.CLIPTextModel(text.PRESETS[family])}


def test_the_names_of_stable_diffusions_own_files_are_known():
    """A few that are easily wrong, from CompVis' and Stability's files."""
    unet, autoencoder, encoder = (names_in_file(part, network, {TEXT + "model."})
                                  for part, network in full_size("sd2").items())
    assert {unet[f"down_blocks.{i}.downsamplers.0.conv.bias"] for i in range(3)} == {
        UNET + f"input_blocks.{n}.0.op.bias" for n in (3, 6, 9)
    }
    assert [unet[f"up_blocks.{i}.upsamplers.0.conv.bias"] for i in range(3)] == [
        UNET + f"output_blocks.{block}.conv.bias" for block in ("2.1", "5.2", "8.2")
    ]
    assert autoencoder["decoder.up_blocks.0.resnets.2.norm1.bias"] == (
        VAE + "decoder.up.3.block.2.norm1.bias"
    )
    assert encoder["text_model.encoder.layers.22.self_attn.v_proj.weight"] == (
        TEXT + "model.transformer.resblocks.22.attn.in_proj_weight"
    )


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_the_full_size_is_read_off_the_tensors(family):
    prefix = TEXT + ("model." if family == "sd2" else "transformer.text_model.")
    networks, tensors = full_size(family, in_channels=1), {}  # 3 is also the kernel's size
    for part, network in networks.items():
        full = network.state_dict()
        for name, theirs in names_in_file(part, network, {prefix}).items():
            thirds = 3 if "in_proj" in theirs else 1
            tensors[theirs] = full[name].repeat_interleave(thirds, 0)
    expected = model.PRESETS[family]
    unet, autoencoder, encoder = configs_of(tensors, expected.sample_size * 8, "here")
    assert unet.num_heads == expected.num_heads
    assert vars(unet) | {"attention_head_dim": 0} == vars(expected) | {"attention_head_dim": 0}
    assert autoencoder == dataclasses.replace(networks["vae"].config,
                                              sample_size=expected.sample_size * 8)
    assert encoder == text.PRESETS[family]


@pytest.mark.parametrize("layers_in_file, layers_used", [(24, 23), (23, 23), (4, 3)])
def test_the_last_layer_of_openclip_is_skipped_unless_the_file_lacks_it(
    layers_in_file, layers_used
):
    shapes = {"token_embedding.weight": (9, 64), "positional_embedding": (7, 64)} | {
        f"transformer.resblocks.{i}.mlp.c_fc.weight": (96, 64) for i in range(layers_in_file)
    }
    tensors = {f"{TEXT}model.{name}": torch.empty(shape) for name, shape in shapes.items()}
    assert text_config(tensors).num_hidden_layers == layers_used


# Forms


def spoil(tensors):
    return {name: torch.zeros_like(tensor) if "resblocks.3." in name else tensor
            for name, tensor in tensors.items()}


def shorten(tensors):
    return {name.replace("transformer.text_model.", "transformer."): tensor
            for name, tensor in tensors.items()}


@pytest.mark.parametrize("family, change", [("sd2", spoil), ("sd1", shorten)],
                         ids=["the skipped layer spoilt", "names without text_model"])
def test_a_file_that_differs_only_there_is_the_same_model(files, tmp_path, family, change):
    other = load_pipeline(changed(tmp_path / "x.safetensors", files[family], change))
    assert_same(other, load_pipeline(files[family]))


def test_a_ckpt_is_the_same_model(files, tmp_path):
    torch.save({"state_dict": load_safetensors(files["sd1"])}, tmp_path / "x.ckpt")
    assert_same(load_pipeline(tmp_path / "x.ckpt"), load_pipeline(files["sd1"]))


def test_a_file_of_halves_becomes_float32_or_stays(files, tmp_path):
    def half(tensors):
        return {name: tensor.half() for name, tensor in tensors.items()}

    path = changed(tmp_path / "x.safetensors", files["sd1"], half)
    expected = {name: t.half() for name, t in state(load_pipeline(files["sd1"])).items()}
    for dtype, wanted in [(torch.float32, torch.float32), (None, torch.float16),
                          (torch.bfloat16, torch.bfloat16)]:
        loaded = state(load_pipeline(path, dtype=dtype))
        assert {tensor.dtype for tensor in loaded.values()} == {wanted}
        assert all(torch.equal(loaded[name], expected[name].to(wanted)) for name in expected)


def test_the_shift_adds_drops_and_reshapes_nothing(files):
    shifted = load_pipeline(files["sd2"])
    assert shifted.unet.config.temporal == "shift"
    assert_same(shifted, load_pipeline(files["sd2"], temporal="none"))


def add_average(tensors):
    average = {"model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
               for name, tensor in tensors.items() if name.startswith(UNET)}
    return tensors | average | {"model_ema.decay": torch.tensor(0.9999)}


def test_ema_weights_are_used_on_request(files, tmp_path):
    path = changed(tmp_path / "x.safetensors", files["sd1"], add_average)
    plain, average = load_pipeline(path), load_pipeline(path, ema=True)
    count = len(plain.unet.state_dict())
    assert_same(plain, load_pipeline(files["sd1"]))
    assert plain.report.ignored["EMA weights (ema=True or --ema uses them)"] == count + 1
    for name, tensor in average.unet.state_dict().items():
        assert torch.equal(tensor, plain.unet.state_dict()[name] + 1)
    assert average.report.ignored["the U-Net's weights beside their average"] == count


@pytest.mark.parametrize("change, message", [
    (lambda x: add_average(x) | {"model_ema.x": torch.ones(1)}, "Stable Diffusion: model_ema.x"),
    (add("model_ema.decay"), "holds no EMA weights"),  # counters stay in files without them
], ids=["an unknown one", "none"])
def test_other_ema_weights_are_refused_when_they_are_requested(files, tmp_path, change, message):
    path = changed(tmp_path / "x.safetensors", files["sd1"], change)
    load_pipeline(path)
    with pytest.raises(ValueError, match=f"x.safetensors: .*{message}"):
        load_pipeline(path, ema=True)


# The report


def test_every_unused_tensor_is_counted_with_its_reason(files, tmp_path):
    schedule = ["betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
                "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
                "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
                "posterior_log_variance_clipped", "posterior_mean_coef1"]
    more = [VAE + "loss.logvar", "safety_checker.concept_embeds", TEXT + "logit_scale"]
    path = changed(tmp_path / "x.safetensors", files["sd1"],
                   lambda tensors: tensors | dict.fromkeys(schedule + more, torch.ones(1)))
    used, ignored, _ = load_pipeline(path).report
    total = sum(len(part) for part in RECORDED["sd1"]["shapes"].values())
    assert used == total - 1  # every file of SD 1 has position ids
    assert ignored["the noise schedule, which is computed"] == len(schedule)
    assert sorted(ignored.values()) == [1, 1, 1, 1, len(schedule)]


def test_the_prediction_type_of_sd2_is_assumed_and_the_report_says_so(files):
    plain = load_pipeline(files["sd2"])
    assert plain.diffusion.prediction_type == "v_prediction" and plain.sampling.image_size == 768
    assert "2-base needs prediction_type='epsilon'" in plain.report.notes[0]
    chosen = load_pipeline(files["sd2"], prediction_type="epsilon")
    assert chosen.diffusion.prediction_type == "epsilon" and chosen.sampling.image_size == 512
    assert not chosen.report.notes
    old = load_pipeline(files["sd1"])
    assert old.diffusion.prediction_type == "epsilon" and not old.report.notes
    assert old.sampling == Sampling(num_frames=1, image_size=512)
