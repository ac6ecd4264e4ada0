"""The handwritten digits that scikit-learn carries."""

import numpy as np

from jopt.data._dataset import Dataset

TEST_EXAMPLES = 360


def digits() -> Dataset:
    """1,797 images of handwritten digits, always split alike: 1,437 to train and 360 to test.

    Images are float32 `[examples, 8, 8, 1]` in [0, 1]; each class has its share of the test images.

    Raises:
      ModuleNotFoundError: if scikit-learn is missing.

    References:
      E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning
      Repository, 1998.
    """
    try:
        from sklearn import datasets, model_selection
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            '`data.digits()` needs scikit-learn: `pip install "jopt[run]"`.'
        ) from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    train_x, test_x, train_y, test_y = model_selection.train_test_split(
        images, labels.astype(np.int32), test_size=TEST_EXAMPLES, stratify=labels, random_state=0
    )
    return Dataset(
        train=(train_x, train_y),
        test=(test_x, test_y),
        classes=10,
        names=tuple(str(digit) for digit in range(10)),
        info=f"digits of scikit-learn, {len(train_x):,} for training, {len(test_x)} for testing",
    )
