"""Image classifiers as tensors: what each class looks for, as images.

    data          digits, MNIST and other image sets  tensor      a classifier as a ``BilinearTensor``
    analyses      truncation, similarity, masks       figures     eigenvectors and spectra as figures

It may import ``explain``, ``show``, ``store`` and ``nn``. Training is in ``training.images``.
"""
