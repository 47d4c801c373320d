"""Every form of a single file gives the same model; the report counts the tensors left out."""

import dataclasses
import functools

import pytest
import torch
from checkpoint_files import RECORDED, TEXT, UNET, VAE, changed, same

import model
import text
import vae
from checkpoints import weights
from checkpoints.names import configs_of, names_in_file
from checkpoints.safetensors_file import load_safetensors
from checkpoints.weights import load_pipeline
from pipeline import Sampling


def state(pipeline):
    parts = ("unet", "vae", "text_encoder")
    return {f"{part}.{name}": tensor for part in parts
            for name, tensor in getattr(pipeline, part).state_dict().items()}


@functools.cache
def full_size(family):
    """{part: network} of Stable Diffusion without memory, {part: {our name: the file's}}."""
    autoencoder = dataclasses.replace(vae.PRESETS["sd"], in_channels=1)  # 3 is also a kernel's size
    with torch.device("meta"):
        networks = {"unet": model.UNet(model.PRESETS[family]),
                    "vae": vae.AutoencoderKL(autoencoder),
                    "text_encoder": text.CLIPTextModel(text.PRESETS[family])}
    prefix = TEXT + ("model." if family == "sd2" else "transformer.text_model.")
    return networks, {part: names_in_file(part, network, {prefix})
                      for part, network in networks.items()}


def test_the_names_of_stable_diffusions_own_files_are_known():
    """A few that are easily wrong, from CompVis' and Stability's files."""
    unet, autoencoder, encoder = full_size("sd2")[1].values()
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
    (networks, names), tensors = full_size(family), {}
    for part, network in networks.items():
        for name, tensor in network.state_dict().items():
            theirs = names[part][name]
            tensors[theirs] = tensor.repeat_interleave(3 if "in_proj" in theirs else 1, 0)
    expected = model.PRESETS[family]
    found = configs_of(tensors, expected.sample_size * 8)
    assert found["unet"].num_heads == expected.num_heads
    heads = {"attention_head_dim": 0}  # one number or one per level
    assert vars(found["unet"]) | heads == vars(expected) | heads
    assert found["vae"] == dataclasses.replace(networks["vae"].config,
                                               sample_size=expected.sample_size * 8)
    assert found["text_encoder"] == text.PRESETS[family]


def spoil(tensors):
    return {name: torch.zeros_like(tensor) if "resblocks.3." in name else tensor
            for name, tensor in tensors.items()}


def shorten(tensors):
    return {name.replace("transformer.text_model.", "transformer."): tensor
            for name, tensor in tensors.items()}


@pytest.mark.parametrize("family, change", [("sd2", spoil), ("sd1", shorten)],
                         ids=["the skipped layer spoilt", "names without text_model"])
def test_a_file_that_differs_only_there_is_the_same_model(files, loaded, tmp_path, family, change):
    other = load_pipeline(changed(tmp_path / "x.safetensors", files[family], change))
    assert same(state(other), state(loaded[family]))  # `loaded` is without the shift


@pytest.mark.parametrize("dtype", [torch.half, torch.float8_e4m3fn])
def test_a_ckpt_of_small_numbers_becomes_float32_or_stays(files, loaded, tmp_path, dtype):
    small = {name: tensor.to(dtype) for name, tensor in load_safetensors(files["sd1"]).items()}
    torch.save({"state_dict": small}, tmp_path / "x.ckpt")
    expected = {name: tensor.to(dtype) for name, tensor in state(loaded["sd1"]).items()}
    assert same(state(load_pipeline(tmp_path / "x.ckpt", dtype=None)), expected)
    assert same(state(load_pipeline(tmp_path / "x.ckpt")),
                {name: tensor.float() for name, tensor in expected.items()})


def add_average(tensors):
    average = {"model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
               for name, tensor in tensors.items() if name.startswith(UNET)}
    return tensors | average | {"model_ema.decay": torch.tensor(0.9999)}


def test_ema_weights_are_used_on_request(files, loaded, tmp_path):
    path = changed(tmp_path / "x.safetensors", files["sd1"], add_average)
    plain, average = load_pipeline(path), load_pipeline(path, ema=True)
    unet = plain.unet.state_dict()
    reasons = ["EMA weights and their counters (ema=True or --ema uses them)",
               "the U-Net's weights beside their average"]
    assert same(state(plain), state(loaded["sd1"]))
    assert plain.report.ignored[reasons[0]] == len(unet) + 1
    assert same(average.unet.state_dict(), {name: tensor + 1 for name, tensor in unet.items()})
    assert [average.report.ignored[reason] for reason in reasons] == [1, len(unet)]


def test_a_file_without_ema_weights_says_so(files):
    with pytest.raises(ValueError, match="sd1: holds no EMA weights"):
        load_pipeline(files["sd1"], ema=True)


def test_every_unused_tensor_is_counted_with_its_reason(files, tmp_path):
    schedule = ["betas", "alphas_cumprod_prev", "sqrt_one_minus_alphas_cumprod",
                "sqrt_recipm1_alphas_cumprod", "posterior_log_variance_clipped"]
    more = [VAE + "loss.logvar", "safety_checker.concept_embeds", TEXT + "logit_scale"]
    path = changed(tmp_path / "x.safetensors", files["sd1"],
                   lambda tensors: tensors | dict.fromkeys(schedule + more, torch.ones(1)))
    used, ignored, _ = load_pipeline(path).report
    total = sum(len(part) for part in RECORDED["sd1"]["shapes"].values())
    assert len(set(used.values())) == total - 1  # every file of SD 1 has position ids
    assert ignored["the noise schedule"] == len(schedule)
    assert sorted(ignored.values()) == [1, 1, 1, 1, len(schedule)]


def test_the_prediction_type_of_sd2_is_assumed_and_the_report_says_so(files, loaded):
    plain = loaded["sd2"]
    assert plain.diffusion.prediction_type == "v_prediction" and plain.sampling.image_size == 768
    assert "2-base needs prediction_type='epsilon'" in plain.report.notes[0]
    chosen = load_pipeline(files["sd2"], prediction_type="epsilon")
    assert chosen.diffusion.prediction_type == "epsilon" and chosen.sampling.image_size == 512
    old = loaded["sd1"]
    assert old.diffusion.prediction_type == "epsilon" and not old.report.notes + chosen.report.notes
    assert old.sampling == Sampling(num_frames=1, image_size=512)


SPEC, V, ZERO = "modelspec.prediction_type", "v_prediction", {"zero_terminal_snr": True}


@pytest.mark.parametrize("family, metadata, signs, given, expected, told", [
    ("sd1", {SPEC: "v", "modelspec.resolution": "832x768"}, (), {}, (V, False, 768),
     [V, "832x768"]),
    ("sd2", {SPEC: "epsilon", "author": "v"}, (), {}, ("epsilon", False, 512), ["epsilon"]),
    ("sd1", {SPEC: "V_Prediction"}, (), {}, (V, False, 512), [V]),
    ("sd1", {"modelspec.predict_key": "v"}, (), {}, (V, False, 512), [V]),
    ("sd1", {SPEC: "v"}, (), {"prediction_type": "epsilon"}, ("epsilon", False, 512), [V]),
    ("sd2", {SPEC: "epsilon"}, ("v_pred",), {}, (V, False, 768), [V]),
    ("sd1", {}, ("v_pred", "ztsnr"), {}, (V, True, 512), [V, "zero terminal SNR"]),
    ("sd1", {}, (), ZERO | {"prediction_type": V}, (V, True, 512), []),
])
def test_a_file_says_its_schedule_and_arguments_override_it(
        files, tmp_path, monkeypatch, family, metadata, signs, given, expected, told):
    monkeypatch.setattr(weights, "read_metadata", lambda _: metadata)
    path = changed(tmp_path / "x", files[family], lambda x: x | dict.fromkeys(signs, torch.ones(0)))
    pipeline = load_pipeline(path, **given)
    diffusion, size = pipeline.diffusion, pipeline.sampling.image_size
    zero = bool(diffusion.alphas_cumprod[-1] == 0)
    assert (diffusion.prediction_type, zero, size) == expected
    assert diffusion.timestep_pairs(10)[0][0] == (999 if zero else 901)  # Lin et al., table 2
    assert list(pipeline.report.notes) == [f"the file says: {fact}" for fact in told]


def test_zero_terminal_snr_needs_a_model_that_predicts_v(files):
    with pytest.raises(ValueError, match="sd1: .*cannot start from zero terminal SNR; use 'v_pre"):
        load_pipeline(files["sd1"], **ZERO)
