"""Decoding of unusual images, which are made here so that the right pixels are known."""

import io
import subprocess
import sys
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.PngImagePlugin
import pytest
from time_limits import HANG_SECONDS

from ppn_jax.data.images import decoding
from ppn_jax.data.images.decoding import SUFFIXES, decode, encode_jpeg, read_sizes, to_pixels
from ppn_jax.errors import InputError

# pytest replaces the module's filters by its own; `test_nothing_is_printed` has neither.
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')


@pytest.fixture
def photo():
  """Makes u8 [24, 40, 3], smooth enough for JPEG and without symmetry that hides a wrong turn."""
  y, x = np.mgrid[:24, :40]
  return np.stack([y * 10, x * 6, (x + y) * 3 + 20], axis=-1).astype(np.uint8)


def save(image, kind, **options):
  if isinstance(image, np.ndarray):
    image = PIL.Image.fromarray(image)
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def difference(a, b):
  assert a.shape == b.shape and a.dtype == np.uint8
  return np.abs(a.astype(int) - b.astype(int)).max()


def test_png_is_exact(photo):
  pixels = decode(save(photo, 'PNG'), name='x')
  np.testing.assert_array_equal(pixels, photo)
  assert pixels.flags.c_contiguous


@pytest.mark.parametrize('options', [{}, {'progressive': True}, {'subsampling': 2}])
def test_jpeg(photo, options):
  assert difference(decode(save(photo, 'JPEG', quality=95, **options), name='x'), photo) <= 12


def test_jpeg_with_a_colour_for_four_rows():
  """4:4:1, for which simplejpeg has no name. The file has its blocks in the order of 4:2:0."""
  grey = np.uint8([[40, 90], [150, 220]]).repeat(8, axis=0).repeat(8, axis=1)
  data = bytearray(save(np.stack([grey] * 3, axis=-1), 'JPEG', subsampling='4:2:0', quality=100))
  frame = data.index(b'\xff\xc0')
  data[frame + 5:frame + 9] = bytes([0, 32, 0, 8])  # 32 x 8 pixels instead of 16 x 16.
  data[frame + 11] = 0x14  # One column and four rows of a colour.
  assert decoding.stored_size(bytes(data), 'a') == (32, 8)
  pixels = decode(bytes(data), name='a')
  assert pixels.shape == (32, 8, 3) and pixels[::8, 0, 0].tolist() == [40, 90, 150, 220]


def test_a_side_too_long_for_a_jpeg_is_an_error():
  with pytest.raises(InputError, match='70000 x 1 pixels do not fit into a JPEG'):
    encode_jpeg(np.zeros((70_000, 1, 3), np.uint8))


def test_encode_jpeg_is_decode_s_inverse(photo):
  assert difference(decode(encode_jpeg(photo[:, ::-1], 97), name='x'), photo[:, ::-1]) <= 12


@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
def test_grey_becomes_three_equal_channels(photo, kind):
  grey = photo[..., 1]
  pixels = decode(save(grey, kind), name='x')
  assert difference(pixels, np.stack([grey] * 3, axis=-1)) <= (3 if kind == 'JPEG' else 0)


def test_cmyk_jpeg_is_what_pillow_makes_of_it(photo):
  data = save(PIL.Image.fromarray(photo).convert('CMYK'), 'JPEG', quality=98)
  pixels = decode(data, name='x')
  pillow = np.asarray(PIL.Image.open(io.BytesIO(data)).convert('RGB'))
  assert difference(pixels, pillow) <= 1
  assert difference(pixels, photo) <= 20


def test_palette(photo):
  image = PIL.Image.fromarray(photo).quantize(16)
  np.testing.assert_array_equal(decode(save(image, 'PNG'), name='x'),
                                np.asarray(image.convert('RGB')))


def test_palette_with_transparency_lies_over_white():
  image = PIL.Image.frombytes('P', (3, 1), bytes([0, 1, 2]))
  image.putpalette([200, 0, 0, 0, 100, 0, 0, 0, 50])
  pixels = decode(save(image, 'PNG', transparency=bytes([255, 0, 128])), name='x')
  np.testing.assert_array_equal(pixels, [[[200, 0, 0], [255, 255, 255], [127, 127, 152]]])


@pytest.mark.parametrize('mode', ['RGBA', 'LA'])
def test_alpha_lies_over_white(mode):
  color = {'RGBA': (10, 20, 30), 'LA': (10,)}[mode]
  image = PIL.Image.new(mode, (3, 1))
  for x, alpha in enumerate((0, 255, 51)):
    image.putpixel((x, 0), (*color, alpha))
  pixels = decode(save(image, 'PNG'), name='x')[0]
  opaque = np.resize(color, 3)
  np.testing.assert_array_equal(pixels[:2], [[255] * 3, opaque])
  assert np.abs(pixels[2] - (opaque * 0.2 + 255 * 0.8)).max() <= 1


def test_colour_key_transparency():
  image = PIL.Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
  pixels = decode(save(image, 'PNG', transparency=(4, 5, 6)), name='x')
  np.testing.assert_array_equal(pixels, [[[1, 2, 3], [255, 255, 255]]])


@pytest.mark.parametrize('kind', ['PNG', 'TIFF'])
def test_16_bit_grey_keeps_its_upper_byte(kind):
  grey = np.array([[0, 255, 256, 0x1234, 0x80ff, 0xffff]], np.uint16)
  np.testing.assert_array_equal(decode(save(grey, kind), name='x')[0, :, 1],
                                [0, 0, 1, 0x12, 0x80, 0xff])


@pytest.mark.parametrize('image, reason', [
    (np.full((2, 2), 0.5, np.float32), 'floating-point'),
    (np.full((2, 2), 1 << 20, np.int32), '1048576'),
])
def test_pixels_without_a_known_range_are_refused(image, reason):
  with pytest.raises(InputError, match=rf'a\.tif.*{reason}'):
    decode(save(image, 'TIFF'), name='a.tif')


@pytest.mark.parametrize('kind', ['GIF', 'BMP', 'WEBP', 'TIFF', 'PPM'])
def test_other_formats(photo, kind):
  options = {'lossless': True} if kind == 'WEBP' else {}
  pixels = decode(save(photo, kind, **options), name='x')
  assert difference(pixels, photo) <= (40 if kind == 'GIF' else 0)


def test_first_frame_of_an_animation(photo):
  frames = [PIL.Image.fromarray(p) for p in (photo, photo[::-1].copy())]
  data = save(frames[0], 'PNG', save_all=True, append_images=frames[1:])
  np.testing.assert_array_equal(decode(data, name='x'), photo)


def rotated(photo, orientation, kind):
  """Makes a file whose stored pixels are `photo`, with an orientation in its EXIF."""
  exif = PIL.Image.Exif()
  exif[0x0112] = orientation
  options = {'quality': 98, 'subsampling': 0} if kind == 'JPEG' else {}
  return save(photo, kind, exif=exif.tobytes(), **options)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(photo, orientation, kind):
  data = rotated(photo, orientation, kind)
  upright = np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))))
  pixels = decode(data, name='x')
  assert difference(pixels, upright) <= 1 and pixels.flags.c_contiguous
  assert difference(decode(data, name='x', size=upright.shape[:2]), upright) <= 1
  if orientation >= 5:  # Annotated as stored.
    assert upright.shape[:2] == (40, 24)
    assert difference(decode(data, name='x', size=(24, 40)), photo) <= 8


@pytest.mark.parametrize('orientation', [0, 9, 300])
def test_unknown_orientation_is_ignored(photo, orientation):
  assert decode(rotated(photo, orientation, 'JPEG'), name='x').shape == photo.shape


def test_garbled_exif_is_ignored(photo):
  data = rotated(photo, 6, 'JPEG')
  at = data.index(b'Exif\0\0') + 6
  assert decode(data[:at] + b'\xee' * 20 + data[at + 20:], name='x').shape == photo.shape


def test_other_size_than_stated(photo):
  with pytest.raises(InputError, match=r'a\.png: the image is 24 x 40, .* say 24 x 41'):
    decode(save(photo, 'PNG'), name='a.png', size=(24, 41))


@pytest.mark.parametrize('kind, options', [
    ('JPEG', {}), ('JPEG', {'progressive': True}), ('PNG', {}), ('GIF', {}), ('BMP', {}),
    ('WEBP', {}), ('TIFF', {'compression': 'tiff_lzw'}), ('PPM', {})])
def test_truncated_anywhere(photo, kind, options):
  """Checks that a cut file is an error or, without trailing bytes only, has the same pixels."""
  data = save(photo, kind, **options)
  whole = decode(data, name='x')
  refused = 0
  for length in range(0, len(data) - 1, 7):
    try:
      np.testing.assert_array_equal(decode(data[:length], name='cut.img'), whole)
    except InputError as e:
      assert str(e).startswith('cut.img: ') and '\n' not in str(e)
      refused += 7
  assert refused > 0.9 * (len(data) - 20)


def test_cmyk_truncated(photo):
  data = save(PIL.Image.fromarray(photo).convert('CMYK'), 'JPEG')
  with pytest.raises(InputError, match='x: damaged or truncated JPEG'):
    decode(data[:-30], name='x')


def test_damaged_jpeg_is_not_half_grey(photo):
  data = save(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), 'JPEG')
  middle = len(data) // 2
  with pytest.raises(InputError, match=r'x: damaged or truncated JPEG'):
    decode(data[:middle] + b'\xff\xd9' + data[middle + 2:], name='x')


def test_harmless_padding_before_the_end_marker(photo):
  data = save(photo, 'JPEG', quality=95)
  np.testing.assert_array_equal(decode(data[:-2] + b'\0\1\2' + data[-2:], name='x'),
                                decode(data, name='x'))


@pytest.mark.parametrize('data, reason', [
    (b'', 'empty'), (b'hello, this is no image\n', 'not an image'),
    (b'\xff\xd8\xffhello', 'not an image|damaged'), (b'%!PS-Adobe-3.0 EPSF-3.0\n', 'not an image'),
    (b'\x89PNG\r\n\x1a\n', 'not an image|damaged')])
def test_no_image(data, reason):
  with pytest.raises(InputError, match=rf'^notes\.jpg: .*({reason})'):
    decode(data, name='notes.jpg')


@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
def test_too_many_pixels(photo, kind):
  data = save(photo, kind)
  assert decode(data, name='x', max_pixels=24 * 40).shape == photo.shape
  with pytest.raises(InputError, match=r'x: too many pixels: 24 x 40 is 960, .* 959'):
    decode(data, name='x', max_pixels=959)


def test_too_many_pixels_is_read_from_the_header():
  """Checks a header of 60,000 x 60,000 and a few bytes, which decoding would reject otherwise."""
  data = bytearray(save(np.zeros((8, 8), np.uint8), 'JPEG'))
  at = data.index(b'\xff\xc0') + 5
  data[at:at + 4] = (60_000).to_bytes(2, 'big') * 2
  with pytest.raises(InputError, match='too many pixels: 60000 x 60000'):
    decode(bytes(data), name='x')
  png = bytearray(save(np.zeros((8, 8), np.uint8), 'PNG'))
  png[16:24] = (60_000).to_bytes(4, 'big') * 2
  png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, 'big')
  with pytest.raises(InputError, match='x: too many pixels'):
    decode(bytes(png), name='x')


@pytest.mark.slow
def test_nothing_is_printed():
  """Runs as a command does, in its own process: Pillow warns of all of these."""
  script = '''
import io, numpy as np, PIL.Image
from ppn_jax.cli.libraries import quiet_libraries
from ppn_jax.data.images.decoding import decode
from ppn_jax.errors import InputError
def save(image, kind, **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()
quiet_libraries()
palette = PIL.Image.frombytes('P', (4, 4), bytes(16))
palette.putpalette([1, 2, 3])
decode(save(palette, 'PNG', transparency=bytes([128])), name='x')
decode(save(PIL.Image.new('1', (10000, 9000)), 'PNG'), name='x')
exif = PIL.Image.Exif()
exif[0x010e], exif[0x0112] = 'text ' * 20, 6
data = save(PIL.Image.new('RGB', (4, 4)), 'JPEG', exif=exif.tobytes())
at = data.index(b'Exif')
decode(data[:at + 40] + b'\\xee' * 30 + data[at + 70:], name='x')
'''
  for flags in ([], ['-W', 'error']):
    done = subprocess.run([sys.executable, *flags, '-c', script], capture_output=True, text=True,
                          timeout=HANG_SECONDS)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('compression', [None, 'tiff_lzw'])
def test_orientation_of_tiff(photo, orientation, compression, tmp_path):
  """Checks sizes, upright and stored pixels of TIFF, which Pillow turns by itself."""
  exif = PIL.Image.Exif()
  exif[0x0112] = orientation
  data = save(photo, 'TIFF', exif=exif, compression=compression)
  (tmp_path / 'a.tif').write_bytes(data)
  upright = np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))))
  assert read_sizes(tmp_path / 'a.tif') == ((24, 40), upright.shape[:2])
  np.testing.assert_array_equal(decode(data, name='x'), upright)
  np.testing.assert_array_equal(to_pixels(PIL.Image.open(io.BytesIO(data))), upright)
  if orientation >= 5:
    np.testing.assert_array_equal(decode(data, name='x', size=(24, 40)), photo)


XMP = [b'<x tiff:Orientation="6"/>', b"<x tiff:Orientation = '6'/>",
       b'<tiff:Orientation>6</tiff:Orientation>']


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('xmp', XMP)
def test_orientation_in_xmp_alone(photo, xmp, kind, tmp_path):
  if kind == 'PNG':
    info = PIL.PngImagePlugin.PngInfo()
    info.add_itxt('XML:com.adobe.xmp', xmp.decode())
    options = {'pnginfo': info}
  elif kind == 'TIFF':
    options = {'tiffinfo': {700: xmp}}
  else:
    options = {'xmp': xmp}
  data = save(photo, kind, **options)
  (tmp_path / 'a').write_bytes(data)
  assert read_sizes(tmp_path / 'a') == ((24, 40), (40, 24))
  assert decode(data, name='x').shape == (40, 24, 3)
  stored = decode(data, name='x', size=(24, 40))
  assert difference(decode(data, name='x'), np.rot90(stored, -1)) == 0
  assert to_pixels(PIL.Image.open(io.BytesIO(data))).shape == (40, 24, 3)


def test_exif_has_priority_over_xmp(photo):
  exif = PIL.Image.Exif()
  exif[0x0112] = 1
  assert decode(save(photo, 'JPEG', xmp=XMP[0], exif=exif), name='x').shape == (24, 40, 3)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
@pytest.mark.parametrize('options', [{}, {'progressive': True}, {'restart_marker_rows': 1}])
def test_jpeg_without_its_end_marker_is_used_and_noted(photo, options, mode, caplog):
  data = save(PIL.Image.fromarray(photo).convert(mode), 'JPEG', **options)
  decoding._without_end.clear()
  for cut in (1, 2):
    name = f'{cut}.jpg'
    lazy = decoding.open_image(data[:-cut], name=name)
    for pixels in (lazy.pixels(), decode(data[:-cut], name=name)):
      np.testing.assert_array_equal(pixels, decode(data, name='x'))
  assert [r.message for r in caplog.records] == [
      f'{name}: the JPEG lacks its end marker, but no pixel; it is used'
      for name in ('1.jpg', '2.jpg')]
  for cut in (3, 5, 12):
    with pytest.raises(InputError, match='damaged or truncated'):
      decode(data[:-cut], name='x')
  for i in range(20):
    decode(data[:-2], name=f'more{i}.jpg')
  assert len(caplog.records) == 6 and 'not named' in caplog.records[-1].message


def test_progressive_jpeg_that_lacks_its_last_scans_is_refused(photo):
  """Checks a file that would decode to a blurred image if it had an end marker."""
  data = save(photo, 'JPEG', progressive=True, quality=95)
  scans = [i for i in range(len(data)) if data[i:i + 2] == b'\xff\xda']
  assert len(scans) > 3
  for start in scans[1:]:
    with pytest.raises(InputError, match='damaged or truncated'):
      decode(data[:start], name='x')


def test_to_pixels(photo, tmp_path):
  PIL.Image.fromarray(photo).save(tmp_path / 'a.png')
  grey, rgba = photo[..., 0], np.concatenate([photo, np.full((24, 40, 1), 51, np.uint8)], -1)
  for given in (photo, tmp_path / 'a.png', str(tmp_path / 'a.png'), PIL.Image.fromarray(photo)):
    np.testing.assert_array_equal(to_pixels(given), photo)
  for given in (grey, grey[..., None], PIL.Image.fromarray(grey)):
    np.testing.assert_array_equal(to_pixels(given), np.stack([grey] * 3, axis=-1))
  for given in (rgba, PIL.Image.fromarray(rgba)):
    assert np.abs(to_pixels(given) - (photo * 0.2 + 204)).max() <= 1
  for mode in ('1', 'P', 'LA', 'CMYK', 'YCbCr', 'I;16'):
    assert to_pixels(PIL.Image.new(mode, (5, 4))).shape == (4, 5, 3)
  turned = PIL.Image.open(io.BytesIO(rotated(photo, 6, 'PNG')))
  np.testing.assert_array_equal(to_pixels(turned), np.rot90(photo, -1))
  np.testing.assert_array_equal(np.asarray(turned), photo)  # The caller's image has not changed.


@pytest.mark.parametrize('given', [None, 3, b'a', {'a': 1}, [1], np.zeros((4, 4, 3)),
                                   np.zeros((4, 4, 3), bool), np.zeros((4, 4, 3), np.int64)])
def test_what_is_no_image_is_a_type_error(given):
  with pytest.raises(TypeError, match='image 7') as error:
    to_pixels(given, 'image 7')
  assert isinstance(error.value, InputError)


def test_pil_image_that_cannot_be_loaded(photo):
  for image in (PIL.Image.open(io.BytesIO(save(photo, 'JPEG')[:-60])), PIL.Image.new('F', (4, 4))):
    with pytest.raises(InputError, match='image 7: '):
      to_pixels(image, 'image 7')


@pytest.mark.parametrize('suffix', ['.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.pgm', '.ppm',
                                    '.pbm', '.pnm', '.bmp', '.dib', '.webp', '.gif', '.tif',
                                    '.tiff'])
def test_every_suffix_is_opened(photo, suffix, tmp_path):
  assert suffix in SUFFIXES
  path = tmp_path / f'a{suffix}'
  PIL.Image.fromarray(photo).save(path, {'.dib': 'BMP', '.pnm': 'PPM', '.pgm': 'PPM',
                                         '.pbm': 'PPM'}.get(suffix))
  assert decoding.load(path).shape == photo.shape
