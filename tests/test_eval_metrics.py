"""The measures: against their formulas written out, peers' networks, and distributions whose distance is known."""

import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import random_network
from training_tiny import MODEL

from minisd.checkpoints.digests import network_digest
from minisd.eval.features import (
    CLIPFeatures,
    DINOFeatures,
    cosine,
    load_dino,
    middle_square,
)
from minisd.eval.frechet import frechet_distance
from minisd.eval.intervals import bootstrap, paired_bootstrap
from minisd.eval.reconstruction import psnr, quantized, ssim
from minisd.eval.retrieval import chance, found, ranks, thumbnails
from minisd.eval.subject import SubjectScorer, diversity_of
from minisd.family import dino
from minisd.family.clip_vision import CLIPVision
from minisd.models.clip import CLIPText
from minisd.tasks.images import to_pil, to_tensor
from minisd.text.tokenizer import Tokenizer


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(n: int, side: int = 16, seed: int = 0) -> torch.Tensor:
    return noise(n, 3, side, side, seed=seed).float().clamp(-1, 1)


# --------------------------------------------------------------------------------------------------- reconstruction


def test_psnr_of_an_error_of_one_grey_level_is_48_dB():
    grey = torch.zeros(2, 3, 12, 12)
    torch.testing.assert_close(psnr(grey, grey + 1 / 127.5), torch.full((2,), 20 * math.log10(255)).double())


def test_psnr_of_equal_pictures_is_infinite_and_every_picture_has_its_own():
    a = pictures(2)
    b = torch.stack([a[0], a[1] + 0.2])
    torch.testing.assert_close(psnr(a, b), torch.tensor([math.inf, 20.0], dtype=torch.float64), rtol=1e-6, atol=0)


def test_ssim_is_wang_2004_eq_13_written_out_window_by_window():
    a, b = noise(1, 3, 16, 18).clamp(-1, 1), noise(1, 3, 16, 18, seed=1).clamp(-1, 1)
    b = (a + b) / 2
    x, y = ((image[0].numpy() + 1) / 2 * 255 for image in (a, b))  # the paper's range of values
    bell = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    weights = np.outer(bell, bell) / bell.sum() ** 2
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for channel in range(3):
        for top in range(16 - 10):
            for left in range(18 - 10):
                p, q = (image[channel, top : top + 11, left : left + 11] for image in (x, y))
                mp, mq = (weights * p).sum(), (weights * q).sum()
                vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
                cov = (weights * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert 0.2 < np.mean(values) < 0.9
    assert ssim(a, b).item() == pytest.approx(np.mean(values), abs=1e-9)


def test_ssim_of_flat_pictures_compares_their_brightness_alone():
    black, grey = torch.full((1, 3, 11, 11), -1.0), torch.zeros(1, 3, 11, 11)
    assert ssim(black, black).item() == pytest.approx(1)
    c1 = 0.01**2  # of values in [0, 1], where the two are 0 and 1/2
    assert ssim(black, grey).item() == pytest.approx(c1 / (0.25 + c1), rel=1e-6)


def test_reconstruction_refuses_pictures_of_other_shapes_and_smaller_than_the_window():
    with pytest.raises(ValueError, match="two batches 'b c h w' of one shape"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="window of 11 pixels; the pictures have 8×8"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_quantized_is_what_an_8_bit_file_gives_back():
    image = 1.3 * pictures(1, 9)
    torch.testing.assert_close(quantized(image), to_tensor(to_pil(image)[0]), atol=1e-6, rtol=0)


# -------------------------------------------------------------------------------------------------- Fréchet distance


def with_moments(mean: torch.Tensor, covariance: torch.Tensor, n: int = 40, seed: int = 0) -> torch.Tensor:
    """n rows whose sample mean and covariance are exactly these."""
    x = noise(n, len(mean), seed=seed)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_with_commuting_covariances_is_known():
    turn = torch.linalg.qr(noise(3, 3))[0]
    variances = torch.tensor([[1.0, 4.0, 9.0], [16.0, 4.0, 0.25]]).double()
    a, b = (with_moments(noise(3, seed=i), turn @ v.diag() @ turn.T, seed=i) for i, v in enumerate(variances))
    # |μ_a - μ_b|² + Σ (σ_a - σ_b)²
    expected = (a.mean(0) - b.mean(0)).square().sum() + (1 - 4) ** 2 + 0 + (3 - 0.5) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_covariances_that_do_not_commute_is_the_trace_of_the_product_s_root():
    a, b = noise(30, 4), noise(50, 4, seed=1) @ noise(4, 4, seed=2)
    product = torch.cov(a.T) @ torch.cov(b.T)
    root = torch.linalg.eigvals(product).sqrt().sum()  # similar to a symmetric matrix: its eigenvalues are real
    means = (a.mean(0) - b.mean(0)).square().sum()
    expected = means + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * root.real
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_is_symmetric_zero_to_itself_and_unmoved_by_order_or_a_common_rotation():
    a, b, turn = noise(9, 12), noise(20, 12, seed=1) + 1, torch.linalg.qr(noise(12, 12, seed=2))[0]
    distance = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-8)  # 9 rows in 12 dimensions: singular
    assert frechet_distance(a.flip(0) @ turn + 3, b @ turn + 3) == pytest.approx(distance, rel=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_refuses_what_has_none():
    with pytest.raises(ValueError, match="two pictures at least"):
        frechet_distance(noise(1, 4), noise(9, 4))
    with pytest.raises(ValueError, match="of one width"):
        frechet_distance(noise(9, 4), noise(9, 5))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(noise(9, 4), noise(9, 4).fill_(math.nan))


# ---------------------------------------------------------------------------------------------------------- retrieval


def test_ranks_count_the_wrong_that_are_as_near_as_the_nearest_right():
    similarity = torch.tensor([[0.9, 0.1, 0.5, 0.5], [0.2, 0.2, 0.2, 0.2]])
    right = torch.tensor([[False, True, True, False], [True, False, True, False]])
    assert ranks(similarity, right).tolist() == [2, 2]  # 0.9 and the tie; both wrong ones, all being alike
    assert found(similarity, right, 2).tolist() == [0, 0]
    assert found(similarity, right, 3).tolist() == [1, 1]


def test_ranks_refuse_a_query_without_an_answer_and_nan():
    with pytest.raises(ValueError, match="1 of 2 queries have no right answer"):
        ranks(torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]))
    with pytest.raises(ValueError, match="NaN"):
        ranks(torch.full((1, 2), math.nan), torch.tensor([[True, False]]))


def test_chance_is_what_blind_drawing_finds():
    assert chance(10, 1, 1562) == pytest.approx(10 / 1562)
    similarity = noise(4000, 30)
    right = torch.zeros(4000, 30, dtype=torch.bool)
    right[:, :3] = True
    assert found(similarity, right, 5).mean().item() == pytest.approx(chance(5, 3, 30), abs=0.025)  # 3 deviations


def test_thumbnails_know_a_picture_again_brighter_and_larger_and_tell_others_apart():
    a = pictures(5, 32) / 2
    again = torch.nn.functional.interpolate(0.5 * a + 0.25, scale_factor=2)
    similarity = thumbnails(a) @ thumbnails(again).T
    torch.testing.assert_close(similarity.diag(), torch.ones(5), atol=1e-5, rtol=0)
    assert (similarity - torch.eye(5)).abs().max() < 0.3


# ---------------------------------------------------------------------------------------------------------- intervals


def test_the_bootstrap_has_the_width_of_the_normal_approximation_where_that_holds():
    values = noise(400)
    interval = bootstrap(values)
    assert interval.mean == pytest.approx(values.mean().item())
    error = 1.96 * values.std() / 20
    assert interval.high - interval.mean == pytest.approx(error.item(), rel=0.15)
    assert interval.mean - interval.low == pytest.approx(error.item(), rel=0.15)
    assert bootstrap(values) == interval != bootstrap(values, seed=1)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8))
def test_an_interval_lies_among_its_values_and_holds_their_mean_where_all_are_alike(values):
    interval = bootstrap(values, resamples=50)
    assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9
    assert bootstrap(values[:1] * 3, resamples=50).low == pytest.approx(values[0])


def test_pairs_see_a_difference_that_separate_means_drown():
    hard = 10 * noise(20)
    a, b = hard + 1 + 0.1 * noise(20, seed=1), hard
    assert paired_bootstrap(a, b).low > 0.9
    assert bootstrap(a).low < bootstrap(b).high


def test_intervals_refuse_what_has_no_mean():
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])
    with pytest.raises(ValueError, match="1 of 2 values are NaN"):
        bootstrap([1.0, math.nan])
    with pytest.raises(ValueError, match="2 values against 3"):
        paired_bootstrap([1, 2], [1, 2, 3])


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.fixture(scope="module")
def official_dino():
    """timm's ViT of DINO's architecture and names, its weights drawn, at a small width and at ViT-S's proportions."""
    timm = pytest.importorskip("timm")
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2, num_classes=0
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in vit.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1)
    return vit.eval()


def test_dino_is_the_vision_transformer_of_timm_under_the_official_names(official_dino):
    network = dino.from_official(official_dino.state_dict())
    assert (network.config.layers, network.config.heads, network.config.image_size) == (2, 2, 32)
    image = pictures(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(image), official_dino(image), atol=2e-5, rtol=1e-5)


def test_the_official_vit_s_16_file_has_these_names_and_shapes():
    with torch.device("meta"):
        network = dino.DINO(dino.DINOConfig())
    assert sum(p.numel() for p in network.parameters()) == 21_665_664
    with pytest.raises(ValueError, match="takes 224×224 pixels"):
        network(torch.zeros(1, 3, 64, 64, device="meta"))


def test_dino_is_read_from_a_pickle_and_from_the_teacher_of_a_training_file(official_dino, tmp_path):
    state = official_dino.state_dict()
    torch.save(state, tmp_path / "dino.pth")
    students = {f"module.backbone.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
    teachers = {f"backbone.{name}": tensor for name, tensor in state.items()}
    torch.save({"student": students, "teacher": teachers, "epoch": 3}, tmp_path / "full.pth")
    plain, full = (load_dino(tmp_path / name) for name in ("dino.pth", "full.pth"))
    assert network_digest(plain) == network_digest(full)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("cls_token"), "holds no DINO ViT"),
        (lambda s: s.pop("blocks.1.norm2.weight"), "blocks.1.norm2.weight is missing"),
        (lambda s: s.update({"blocks.1.more": torch.zeros(2)}), "blocks.1.more is missing, too many"),
        (
            lambda s: s.update({"pos_embed": torch.zeros(1, 16, 128)}),
            "position_embedding is missing, too many, or of",
        ),
    ],
)
def test_what_is_no_dino_is_refused_by_name(official_dino, tmp_path, change, sentence):
    state = official_dino.state_dict()
    change(state)
    torch.save(state, tmp_path / "dino.pth")
    with pytest.raises(ValueError, match=sentence) as caught:
        load_dino(tmp_path / "dino.pth")
    assert str(tmp_path) in str(caught.value)


def test_pictures_are_brought_to_size_as_pil_does_it():
    image = Image.fromarray((255 * np.random.default_rng(0).random((50, 80, 3))).astype(np.uint8))
    expected = image.resize((38, 24), Image.Resampling.BICUBIC).crop((7 + 4, 4, 7 + 20, 20))
    ours = middle_square(to_tensor(image), 24, 16, "bicubic")
    assert (ours - to_tensor(expected)).abs().max() <= 2.5 / 127.5  # PIL rounds between its two passes


# ---------------------------------------------------------------------------------------------------- subject fidelity


@pytest.fixture(scope="module")
def clip():
    text, vision = random_network("text", MODEL.text), random_network("vision", MODEL.vision)
    return CLIPFeatures(text, vision, Tokenizer(), interpolation="bilinear")


def test_the_space_s_name_tells_network_and_resizing(clip):
    other = CLIPFeatures(clip.text, random_network("vision", MODEL.vision, 1), Tokenizer(), interpolation="bilinear")
    assert "16 px, bilinear, antialiased; vision tower sha256:" in clip.name
    assert clip.name != other.name


def test_features_do_not_depend_on_the_batch_nor_on_how_pictures_are_given(clip):
    images = quantized(pictures(5, 20))
    features = clip.images(images)
    eight_bits = torch.stack([torch.from_numpy(np.array(p)) for p in to_pil(images)]).permute(0, 3, 1, 2)
    for same in (clip.images(images, batch_size=2), clip.images(to_pil(images)), clip.images(eight_bits)):
        torch.testing.assert_close(same, features, atol=1e-5, rtol=1e-5)


def test_fidelity_scores_are_the_mean_cosines_of_the_paper(clip, official_dino):
    real, images, prompts = pictures(3, seed=1), pictures(4, seed=2), ["a cat", "a cat", "a red cat", "a cat"]
    seen = DINOFeatures(dino.from_official(official_dino.state_dict()))
    scores = SubjectScorer(clip, real, seen).scores(images, prompts, class_images=pictures(2, seed=3))
    i, r, d, dr, t = clip.images(images), clip.images(real), seen.images(images), seen.images(real), clip.texts(prompts)
    assert scores.keys() == {"CLIP-I", "DINO", "CLIP-T", "PRES", "DIV"}
    mean = lambda a, b: np.mean([torch.cosine_similarity(x, y, dim=0).item() for x in a for y in b])  # noqa: E731
    assert scores["CLIP-I"] == pytest.approx(mean(i, r), abs=1e-5)
    assert scores["DINO"] == pytest.approx(mean(d, dr), abs=1e-5)
    assert scores["CLIP-T"] == pytest.approx(np.mean([mean([x], [y]) for x, y in zip(i, t, strict=True)]), abs=1e-5)
    assert scores["PRES"] == pytest.approx(mean(seen.images(pictures(2, seed=3)), dr), abs=1e-5)
    pairs = [(0, 1), (0, 3), (1, 3)]  # of one prompt
    assert scores["DIV"] == pytest.approx(np.mean([1 - mean([d[a]], [d[b]]) for a, b in pairs]), abs=1e-5)


def test_without_dino_its_score_is_missing_and_the_spaces_say_where_the_others_are_measured(clip):
    judge = SubjectScorer(clip, pictures(2))
    scores = judge.scores(pictures(2, seed=1), "a cat")
    assert scores.keys() == {"CLIP-I", "CLIP-T", "DIV"}
    assert judge.spaces == dict.fromkeys(["CLIP-I", "CLIP-T", "PRES", "DIV"], clip.name)


def test_the_subject_itself_scores_1_and_one_picture_again_and_again_has_no_diversity(clip):
    same = pictures(1).repeat(3, 1, 1, 1)
    scores = SubjectScorer(clip, same).scores(same, "a cat", class_images=same)
    assert scores["CLIP-I"] == pytest.approx(1, abs=1e-5)
    assert scores["PRES"] == pytest.approx(1, abs=1e-5)
    assert scores["DIV"] == pytest.approx(0, abs=1e-5)


def test_scores_of_each_picture_average_to_the_scores(clip):
    judge, images = SubjectScorer(clip, pictures(3)), pictures(4, seed=1)
    scores = judge.scores(images, "a cat")
    for name, values in judge.each(images, "a cat").items():
        assert values.shape == (4,)
        assert values.mean().item() == pytest.approx(scores[name], abs=1e-6)


def test_diversity_needs_two_pictures_of_a_prompt():
    features = noise(3, 4)
    assert diversity_of(features, ["a", "b", "c"]) is None
    assert diversity_of(features, ["a", "b", "a"]) == pytest.approx(1 - cosine(features[:1], features[2:]).item())


def test_judges_refuse_what_they_cannot_compare(clip):
    with pytest.raises(ValueError, match="no pictures to look at"):
        SubjectScorer(clip, [])
    with pytest.raises(ValueError, match="2 pictures and 3 prompts"):
        SubjectScorer(clip, pictures(1)).scores(pictures(2), ["a", "b", "c"])
    with pytest.raises(ValueError, match="share no space: projection_dim is 8 and None"):
        CLIPFeatures(CLIPText(MODEL.text), CLIPVision(replace(MODEL.vision, projection_dim=None)), Tokenizer())


def test_features_that_are_not_finite_are_refused(clip):
    damaged = deepcopy(clip.vision)
    damaged.class_embedding.data[0] = math.nan
    with pytest.raises(ValueError, match="2 of 2 features of CLIPVision are NaN"):
        CLIPFeatures(clip.text, damaged, Tokenizer()).images(pictures(2))
