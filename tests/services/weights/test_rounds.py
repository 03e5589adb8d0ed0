from __future__ import annotations

from services.weights.rounds import Epochs, Request


def request(reader: str, width: int = 1) -> Request:
    return Request(reader, "v", width)


def test_a_reader_has_as_many_ranks_as_workers() -> None:
    group = Epochs("p").open([request("b", 4), request("a", 2), request("c")], "h", 1)
    assert group.first_ranks == {"a": 1, "b": 3, "c": 7}
    assert group.world == 8


def test_rounds_of_the_same_readers_share_an_epoch() -> None:
    epochs = Epochs("p")
    epochs.open([request("a"), request("b")], "h", 1)
    one, other = epochs.round("v", 2), epochs.round("w", 3)
    assert one.epoch == other.epoch
    assert one.number < other.number
    assert epochs.fits([request("b"), request("a")])


def test_any_other_set_of_readers_is_a_new_epoch() -> None:
    epochs = Epochs("p")
    names = [epochs.open([request("a")], "h", 1).epoch]
    for readers in ([request("a"), request("b")], [request("b")], [request("b", 2)]):
        assert not epochs.fits(readers)
        names.append(epochs.open(readers, "h", 1).epoch)
    assert len(set(names)) == 4


def test_a_failed_group_fits_no_readers() -> None:
    epochs = Epochs("p")
    failed = epochs.open([request("a")], "h", 1).epoch
    epochs.drop()
    assert not epochs.fits([request("a")])
    assert epochs.open([request("a")], "h", 1).epoch != failed


def test_epochs_of_two_publishers_have_different_names() -> None:
    assert Epochs("p").open([request("a")], "h", 1).epoch != Epochs("q").open([request("a")], "h", 1).epoch
