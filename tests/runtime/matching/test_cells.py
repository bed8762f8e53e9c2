from __future__ import annotations

import numpy as np

from ditf.runtime.features import FeatureMap
from ditf.runtime.matching.cells import cell_centres, to_pixels, unit_cells
from ditf.runtime.matching.interpolation import upsampling_matrix
from tests.runtime.maps import random_map


def test_unit_cells():
    features = random_map(0, (5, 3, 4), (9, 9), np.float16)
    features.array[:, 1, 2] = 0
    cells = unit_cells(features)
    assert cells.dtype == np.float32
    expected = features.array[:, 2, 1].astype(np.float64)
    np.testing.assert_allclose(cells[2 * 4 + 1], expected / np.linalg.norm(expected), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(cells[1 * 4 + 2], 0)


def test_centres_are_where_upsampling_gives_the_cell_alone():
    features = random_map(0, (2, 3, 5), (15, 35))  # odd numbers of pixels to a cell
    centres = cell_centres(features)
    assert centres.shape == (15, 2)
    for axis, cells in ((0, 5), (1, 3)):
        matrix = upsampling_matrix(features.image_size[1 - axis], cells)
        positions = np.unique(centres[:, axis]).astype(int)
        np.testing.assert_array_equal(matrix[positions], np.eye(cells, dtype=np.float32))


def test_positions_stay_inside_a_padded_image():
    padded = FeatureMap(np.ones((1, 3, 4), np.float32), (45, 64), (2.25, 4.0))
    np.testing.assert_allclose(cell_centres(padded)[[0, -1]], [[7.5, 9.5], [55.5, 44.0]])
    np.testing.assert_array_equal(to_pixels(np.array([[-3.0, 9.0]]), padded), [[0.0, 44.0]])
