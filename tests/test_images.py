"""Pictures in and out: every kind of PIL image, masks, feathering, compositing, sheets."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lively import mask, picture, pixels
from PIL import Image

from minisd.tasks.images import (
    composite,
    grid,
    inward_feather,
    load_image,
    pad_to_multiple,
    to_mask,
    to_pil,
    to_tensor,
    to_uint8,
)

ROTATED = 6  # EXIF: the camera was turned by 90°
masks = st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**32 - 1), st.floats(0.02, 0.9))


def random_mask(width: int, height: int, seed: int, density: float) -> torch.Tensor:
    """'1 1 h w' bool: specks, and rectangles where dense."""
    rng = np.random.default_rng(seed)
    found = rng.random((height, width)) < density
    top, left = rng.integers(height), rng.integers(width)
    found[top : top + rng.integers(height + 1), left : left + rng.integers(width + 1)] = True
    return torch.from_numpy(found)[None, None]


def rotated(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.getexif()[0x0112] = ROTATED
    return image


def test_every_8_bit_value_survives_the_way_to_minus_one_to_one_and_back():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    tensor = to_tensor(image)
    assert tensor.shape == (1, 3, 16, 16)
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert to_pil(tensor) == [image]


def test_values_beyond_minus_one_to_one_are_clamped_and_others_rounded_to_nearest():
    assert to_uint8(torch.tensor([-7.0, -1.0, 0.999, 1.0, 7.0])).tolist() == [0, 0, 255, 255, 255]
    assert to_uint8(torch.tensor([100.4, 100.6]) / 127.5 - 1).tolist() == [100, 101]


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV"])
def test_opaque_pictures_of_any_mode_are_what_pil_makes_of_them(mode):
    image = picture(20, 12).convert(mode)
    assert to_pil(to_tensor(image)) == [image.convert("RGB")]


def test_a_picture_is_turned_upright():
    image = picture(20, 12)
    assert to_pil(to_tensor(rotated(image))) == [image.transpose(Image.Transpose.ROTATE_270)]
    assert to_mask(rotated(mask((0, 0, 5, 3), 20, 12)), (20, 12))[0, 0, :5, -3:].all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparent_parts_lie_over_white_in_a_picture_and_over_black_in_a_mask(mode):
    image = Image.new("LA", (4, 2), (255, 0))
    image.paste((0, 255), (0, 0, 2, 2))
    image = image.convert("RGBA" if mode in ("RGBA", "PA", "RGBa") else "LA").convert(mode)
    assert to_tensor(image)[0, :, 0].tolist() == [[-1, -1, 1, 1]] * 3
    assert not to_mask(image, (2, 4)).any()


def test_half_transparent_is_half_white():
    image = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert to_uint8(to_tensor(image)).flatten().tolist() == [127] * 3


def test_the_transparent_colour_of_a_palette_lies_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    image.info["transparency"] = 1
    assert to_uint8(to_tensor(image))[0, :, 0].T.tolist() == [[255, 0, 0], [255, 255, 255]]


def test_16_bits_of_grey_become_8_and_are_not_clipped(tmp_path):
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    deep = load_image(tmp_path / "deep.png")
    assert deep.mode.startswith("I")
    assert to_uint8(to_tensor(deep))[0, 0].tolist() == [[0, 1, 128, 255]]
    assert to_mask(deep, (1, 4)).flatten().tolist() == [False, False, True, True]
    assert to_uint8(to_tensor(Image.fromarray(values.astype(np.int32))))[0, 0].tolist() == [[0, 1, 128, 255]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_a_mask_of_any_mode_is_true_where_it_is_white(mode):
    found = to_mask(mask((3, 2, 9, 7), 16, 12).convert(mode), (12, 16))
    assert found.shape == (1, 1, 12, 16)
    assert found.dtype == torch.bool
    assert found.sum() == 6 * 5
    assert found[0, 0, 2:7, 3:9].all()


def test_grey_counts_as_white_from_128_on():
    image = Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8))
    assert to_mask(image, (1, 4)).flatten().tolist() == [False, False, True, True]


def test_what_is_no_picture_is_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match="the mask is 5×4, the image 8×4: make them equal"):
        to_mask(mask((0, 0, 1, 1), 5, 4), (4, 8))
    with pytest.raises(ValueError, match="a PIL image, not str: files are opened by minisd"):
        to_tensor("apple.png")
    with pytest.raises(ValueError, match="no known range: convert it to 8 bits"):
        to_tensor(Image.new("F", (2, 2)))
    with pytest.raises(ValueError, match=r"missing\.png: there is no such image"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="not a readable image"):
        load_image(tmp_path)
    with pytest.raises(ValueError, match="a grid needs at least one image"):
        grid([])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_file_is_a_picture_or_a_valueerror_that_names_it(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged"
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]))
    image = rotated(picture(9, 7))
    image.save(path, kind, exif=image.getexif())
    content = bytearray(path.read_bytes()[: data.draw(st.integers(0, 2000))])
    for _ in range(data.draw(st.integers(0, 4)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        image = load_image(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017 (either outcome is right)
    else:
        assert isinstance(image, Image.Image)


def test_resizing_is_pils_lanczos():
    image = picture(20, 12)
    assert to_pil(to_tensor(image, (6, 10))) == [image.resize((10, 6), Image.Resampling.LANCZOS)]


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 8]))
def test_padding_reaches_the_next_multiple_and_repeats_the_edge(height, width, factor):
    x = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width)
    padded = pad_to_multiple(x, factor)
    tall, wide = padded.shape[-2:]
    assert tall % factor == wide % factor == 0
    assert 0 <= tall - height < factor
    assert 0 <= wide - width < factor
    assert torch.equal(padded[..., :height, :width], x)
    assert (padded[..., height:, :width] == x[..., -1:, :]).all()
    assert (padded[..., width:] == padded[..., width - 1 : width]).all()


@settings(max_examples=150, deadline=None)
@given(masks, st.integers(0, 12))
def test_feathering_stays_inside_the_mask_and_reaches_1_in_it(shape, width):
    found = random_mask(*shape)
    weight = inward_feather(found, width)
    assert torch.equal(weight > 0, found)
    assert weight.max() <= 1
    if found.any():
        assert weight.max() == 1
    if width <= 1:
        assert torch.equal(weight, found.float())


def test_feathering_rises_over_so_many_pixels_and_not_from_the_pictures_edge():
    found = to_mask(mask((0, 0, 12, 5), 20, 5), (5, 20))
    expected = [1] * 9 + [0.75, 0.5, 0.25] + [0] * 8
    assert inward_feather(found, 4)[0, 0].tolist() == [expected] * 5


def test_a_part_narrower_than_the_feather_is_fully_painted_in_its_middle():
    found = torch.zeros(1, 1, 20, 40, dtype=torch.bool)
    found[..., 8:11, :] = True  # a wire, three pixels thick
    found[..., 2:18, 20:36] = True  # and a block on it
    weight = inward_feather(found, 8)[0, 0]
    torch.testing.assert_close(weight[8:11, 5], torch.tensor([0.5, 1.0, 0.5]))
    torch.testing.assert_close(weight[2:10, 28], torch.arange(1, 9) / 8)


@settings(max_examples=100, deadline=None)
@given(masks, st.integers(0, 12))
def test_compositing_keeps_every_bit_outside_the_mask(shape, width):
    found = random_mask(*shape)
    size = (1, 3, *found.shape[-2:])
    rng = torch.Generator().manual_seed(shape[2])
    original, painted = (torch.randint(256, size, generator=rng).to(torch.uint8) for _ in range(2))
    result = composite(original, painted, inward_feather(found, width))
    outside = ~found.expand(size)
    assert torch.equal(result[outside], original[outside])
    low, high = torch.minimum(original, painted), torch.maximum(original, painted)
    assert ((low <= result) & (result <= high)).all()
    if width <= 1:
        assert torch.equal(result[~outside], painted[~outside])


@pytest.mark.parametrize(
    ("count", "columns", "size"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (4, 2, 2), (5, 3, 2), (9, 3, 3)]
)
def test_a_grid_is_about_square_and_read_row_by_row(count, columns, size):
    images = [Image.new("RGB", (6, 4), (40 * i, 0, 0)) for i in range(count)]
    sheet = grid(images)
    assert sheet.size == (6 * columns, 4 * size)
    for i, image in enumerate(images):
        left, top = i % columns * 6, i // columns * 4
        assert sheet.crop((left, top, left + 6, top + 4)) == image


def test_a_grid_has_the_columns_asked_for():
    assert grid([picture(6, 4)] * 3, columns=3).size == (18, 4)
    assert (pixels(grid([picture(6, 4)] * 3, columns=2))[4:, 6:] == 255).all()
