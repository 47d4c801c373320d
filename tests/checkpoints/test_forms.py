"""Every form of a single file gives the same model; the report counts the tensors left out."""

import dataclasses

import pytest
import torch
from checkpoint_files import RECORDED, TEXT, UNET, VAE, changed, write_files

import model
import text
import vae
import weights
from checkpoints.containers import read_checkpoint
from checkpoints.configs import configs_of, text_config
from checkpoints.names import names_in_file
from files import load_safetensors
from weights import load_pipeline


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


def test_the_names_of_stable_diffusions_own_files_are_known():
    """A few that are easily wrong, from CompVis' and Stability's files."""
    with torch.device("meta"):
        unet, autoencoder = model.UNet(model.PRESETS["sd2"]), vae.AutoencoderKL(vae.PRESETS["sd"])
        encoder = text.CLIPTextModel(text.PRESETS["sd2"])
    here = {TEXT + "model.": None}
    unet, autoencoder, encoder = (
        names_in_file(part, network, here, False)
        for part, network in [("unet", unet), ("vae", autoencoder), ("text_encoder", encoder)]
    )
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
    sd = dataclasses.replace(vae.PRESETS["sd"], in_channels=1)  # 3 is also the kernel's size
    with torch.device("meta"):
        networks = {"unet": model.UNet(model.PRESETS[family]), "vae": vae.AutoencoderKL(sd),
                    "text_encoder": text.CLIPTextModel(text.PRESETS[family])}
    tensors = {prefix + "x": torch.empty(0)}
    for part, network in networks.items():
        full = network.state_dict()
        for name, place in names_in_file(part, network, {prefix: None}, False).items():
            thirds = 3 if "in_proj" in place else 1
            tensors[place] = full[name].repeat_interleave(thirds, 0)
    size = model.PRESETS[family].sample_size * 8
    unet, autoencoder, encoder = configs_of(tensors, size, "here")
    expected = model.PRESETS[family]
    assert unet.num_heads == expected.num_heads
    assert vars(unet) | {"attention_head_dim": 0} == vars(expected) | {"attention_head_dim": 0}
    assert autoencoder == dataclasses.replace(sd, sample_size=size)
    assert encoder == text.PRESETS[family]


@pytest.mark.parametrize("layers_in_file, layers_used", [(24, 23), (23, 23), (4, 3)])
def test_the_last_layer_of_openclip_is_skipped_unless_it_is_gone_already(
    layers_in_file, layers_used
):
    shapes = {"token_embedding.weight": (9, 64), "positional_embedding": (7, 64)} | {
        f"transformer.resblocks.{i}.mlp.c_fc.weight": (96, 64) for i in range(layers_in_file)
    }
    tensors = {f"{TEXT}model.{name}": torch.empty(shape) for name, shape in shapes.items()}
    assert text_config(tensors).num_hidden_layers == layers_used


# Forms


def test_the_skipped_layer_changes_nothing(files, tmp_path):
    def spoil(tensors):
        for name in tensors:
            if "resblocks.3." in name:
                tensors[name] = torch.zeros_like(tensors[name])

    other = load_pipeline(changed(tmp_path / "x.safetensors", files, "sd2", spoil))
    assert_same(other, load_pipeline(files["sd2"]))


def test_names_without_text_model_are_the_same_model(files, tmp_path):
    def shorten(tensors):
        return {name.replace("transformer.text_model.", "transformer."): tensor
                for name, tensor in tensors.items()}

    other = load_pipeline(changed(tmp_path / "x.safetensors", files, "sd1", shorten))
    assert_same(other, load_pipeline(files["sd1"]))


@pytest.mark.parametrize("nested", [0, 1, 2])
def test_a_ckpt_is_the_same_model(files, tmp_path, nested):
    checkpoint = load_safetensors(files["sd1"])
    for _ in range(nested):
        checkpoint = {"state_dict": checkpoint, "global_step": 3}
    torch.save(checkpoint, tmp_path / "x.ckpt")
    assert_same(load_pipeline(tmp_path / "x.ckpt"), load_pipeline(files["sd1"]))


def test_a_file_of_halves_becomes_float32_or_stays(files, tmp_path):
    def half(tensors):
        return {name: tensor.half() for name, tensor in tensors.items()}

    path = changed(tmp_path / "x.safetensors", files, "sd1", half)
    expected = {name: t.half() for name, t in state(load_pipeline(files["sd1"])).items()}
    for dtype, wanted in [(torch.float32, torch.float32), (None, torch.float16),
                          (torch.bfloat16, torch.bfloat16)]:
        loaded = state(load_pipeline(path, dtype=dtype))
        assert {tensor.dtype for tensor in loaded.values()} == {wanted}
        assert all(torch.equal(loaded[name], expected[name].to(wanted)) for name in expected)


def test_tensors_of_the_right_dtype_are_used_as_they_lie_in_the_file(files, monkeypatch):
    kept = []

    def read_and_keep(path):
        tensors = read_checkpoint(path)
        kept.extend(tensor.data_ptr() for tensor in tensors.values())
        return tensors

    monkeypatch.setattr(weights, "read_checkpoint", read_and_keep)
    loaded = state(load_pipeline(files["sd1"]))
    assert {tensor.data_ptr() for tensor in loaded.values()} <= set(kept)


def test_the_shift_adds_drops_and_reshapes_nothing(files):
    shifted = load_pipeline(files["sd2"])
    assert shifted.unet.config.temporal == "shift"
    assert_same(shifted, load_pipeline(files["sd2"], temporal="none"))


def test_ema_weights_are_used_on_request(files, tmp_path):
    def add_average(tensors):
        average = {
            "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
            for name, tensor in tensors.items() if name.startswith(UNET)
        }
        return tensors | average | {"model_ema.decay": torch.tensor(0.9999)}

    path = changed(tmp_path / "x.safetensors", files, "sd1", add_average)
    plain, average = load_pipeline(path), load_pipeline(path, ema=True)
    count = len(plain.unet.state_dict())
    assert_same(plain, load_pipeline(files["sd1"]))
    assert plain.report.ignored["EMA weights (ema=True or --ema uses them)"] == count + 1
    for name, tensor in average.unet.state_dict().items():
        assert torch.equal(tensor, plain.unet.state_dict()[name] + 1)
    assert average.report.ignored["the U-Net's weights beside their average"] == count


def test_an_unknown_ema_weight_is_refused_when_they_are_requested(files, tmp_path):
    def add_average(tensors):
        average = {"model_ema." + name.removeprefix("model.").replace(".", ""): tensor
                   for name, tensor in tensors.items() if name.startswith(UNET)}
        return tensors | average | {"model_ema.diffusion_modelsurprise": torch.ones(1)}

    path = changed(tmp_path / "x.safetensors", files, "sd1", add_average)
    load_pipeline(path)
    with pytest.raises(ValueError, match="1 unexpected: model_ema.diffusion_modelsurprise"):
        load_pipeline(path, ema=True)


# The report


def test_everything_that_is_not_used_is_counted_with_its_reason(files, tmp_path):
    names = ["betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
             "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
             "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
             "posterior_log_variance_clipped", "posterior_mean_coef1"]
    more = [VAE + "loss.logvar", "safety_checker.concept_embeds", TEXT + "logit_scale"]

    def add(tensors):
        return tensors | {name: torch.ones(1) for name in names + more}

    report = load_pipeline(changed(tmp_path / "x.safetensors", files, "sd1", add)).report
    total = sum(len(part) for part in RECORDED["sd1"]["shapes"].values())
    assert report.used == total - 1  # the numbers of positions, which are in every file of SD 1
    assert sorted(report.ignored.values()) == [1, 1, 1, 1, len(names)]
    assert f"{len(names)} ignored: the noise schedule" in str(report)


def test_the_prediction_type_of_sd2_is_assumed_and_said_so(files):
    plain = load_pipeline(files["sd2"])
    assert plain.diffusion.prediction_type == "v_prediction" and plain.sampling.image_size == 768
    assert "2-base needs prediction_type='epsilon'" in str(plain.report)
    chosen = load_pipeline(files["sd2"], prediction_type="epsilon")
    assert chosen.diffusion.prediction_type == "epsilon" and chosen.sampling.image_size == 512
    assert not chosen.report.notes


def test_sd1_predicts_noise_and_draws_an_image(files):
    pipeline = load_pipeline(files["sd1"])
    assert pipeline.diffusion.prediction_type == "epsilon" and pipeline.report.notes == ()
    assert (pipeline.sampling.num_frames, pipeline.sampling.image_size) == (1, 512)
