"""``load``: from what a user writes after ``--data`` to a ``Dataset``."""

from __future__ import annotations

from pathlib import Path

from torchconv._common import check, check_positive, did_you_mean
from torchconv.data import NAMES, arrays, folder, named, ts
from torchconv.data.dataset import Dataset
from torchconv.data.source import Source, build


def load(
    spec: str,
    *,
    root: str | Path | None = None,
    image_size: int | None = None,
    limit: int | None = None,
    val_fraction: float = 0.15,
    test_fraction: float = 0.2,
    seed: int = 0,
    progress: bool = False,
) -> Dataset:
    """Load a classification data set into memory, split and ready to train on.

    ``spec`` is looked at in this order (write ``./digits`` for a folder of that name):

    - ``digits``: scikit-learn's 1797 grey 8 x 8 pictures, embedded, offline.
    - ``fashion-mnist``, ``cifar10``: looked for under ``root``, ``$TORCHCONV_DATA`` and the user cache; the first
      place that has the set wins. Otherwise downloaded from the publisher into ``root`` or the cache, and verified.
      CIFAR-10 is read from the binary version, from a 12,000-image JPEG subset, or from a 4,100-image lossless subset,
      in this order of preference within one place; ``warnings`` says which.
    - ``FILE.npz``: see ``torchconv.data.arrays``; ``FILE.ts``: see ``torchconv.data.ts``.
    - a folder: ``DIR/CLASS/*.png`` or ``DIR/{train,val,test}/CLASS/*.png`` (``torchconv.data.folder``), or one with the
      ``.ts`` files of one problem.
    - the bare name of a UCR/UEA problem kept under ``root`` or ``$TORCHCONV_DATA`` (also in its ``ucr_uea`` folder).

    Splits are stratified, disjoint, and depend on the labels and ``seed`` only; a split made by the publisher is kept.

    Args:
        spec: name or path, see above.
        root: folder with the data, or the set's own folder.
        image_size: scale images to this square: shorter side, then centre crop. By default images keep their size; a
            folder's images of unequal size, or larger than 96, become 64 x 64.
        limit: keep about this share: exactly ``limit`` training examples (stratified), the same share of the validation
            examples, and the same share but at least 500 (or all) of the test examples. At least one a class.
        val_fraction: share of the training part (after the test examples left it) used for validation, in (0, 1).
        test_fraction: share of all examples used for testing when there is no test part, in (0, 1).
        seed: of the splits and the subset, 0 to 2**32 - 1.
        progress: show bars for downloads and decoding on standard error.

    Raises:
        ValueError: a wrong argument, or data that cannot be used; the message says which and what to do.
        FileNotFoundError: nothing of that name, or a set that is neither here nor downloadable.

    Example:
        >>> load("digits", limit=100).train.x.shape
        torch.Size([100, 1, 8, 8])
    """
    spec = str(spec)
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        check(0 < fraction < 1, name, fraction, "must lie between 0 and 1, both excluded")
    for name, value in (("image_size", image_size), ("limit", limit)):
        if value is not None:
            check_positive(name, value)
    check(isinstance(seed, int) and 0 <= seed < 2**32, "seed", seed, "must be an integer from 0 to 4294967295")
    if root is not None and not Path(root).expanduser().is_dir():
        raise FileNotFoundError(f"root={str(root)!r}: no such folder")
    source = _resolve(spec, root, image_size, progress)
    return build(
        spec,
        source,
        image_size=image_size,
        limit=limit,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
    )


def _resolve(spec: str, root: str | Path | None, image_size: int | None, progress: bool) -> Source:
    name = named.canonical(spec)
    if name is not None:
        return named.open_named(name, root, progress)
    path = Path(spec).expanduser()
    if path.is_dir():
        if any(path.glob("*.ts")):
            return ts.open_folder(path)
        return folder.open_folder(path, image_size, progress)
    if path.is_file():
        match path.suffix.lower():
            case ".npz":
                return arrays.open_npz(path)
            case ".ts":
                return ts.open_file(path)
        raise ValueError(
            f"spec={spec!r}: a file must be an .npz of arrays or a UCR/UEA .ts file, or give a folder of images"
        )
    if path.name == spec and not path.suffix:
        problems = ts.problems(named.places(root))
        found = {p.lower(): p for p in problems}.get(spec.lower())
        if found is not None:
            return ts.open_folder(problems[found], found)
        hint = did_you_mean(spec, [*NAMES, *problems])
        raise FileNotFoundError(f"spec={spec!r}: no such set, folder or file (is root, --data-root, right?); {hint}")
    raise FileNotFoundError(f"spec={spec!r}: no such file or folder; the named sets are {', '.join(NAMES)}")
