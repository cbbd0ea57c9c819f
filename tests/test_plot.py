"""Names of builds that lie together stay apart."""

from itertools import combinations

import pytest

from mpqc.plot import _name_points

POINTS = [("w2a2", 0.199, 91.0), ("w3a3", 0.202, 92.0), ("w4a4", 0.204, 92.1), ("best", 0.2, 92.0)]


def test_names_do_not_overlap() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, panel = pyplot.subplots()
    panel.plot([0.1, 1.0], [60.0, 93.0])
    figure.canvas.draw()  # scales are final
    _name_points(panel, POINTS)
    boxes = [text.get_window_extent() for text in panel.texts]
    pyplot.close(figure)
    assert [text.get_text() for text in panel.texts] == [name for name, _, _ in POINTS]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
