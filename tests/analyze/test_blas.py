"""BLAS on one thread while blocks are worked on in threads of our own."""

from analyze import blas


def threads() -> list[int]:
    return [library.num_threads for library in blas._libraries().lib_controllers]


def test_blas_is_on_one_thread_until_the_last_has_left() -> None:
    for library in blas._libraries().lib_controllers:
        library.set_num_threads(2)
    before = threads()
    assert before
    first, second = blas.single_threaded(), blas.single_threaded()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert set(threads()) == {1}
    second.__exit__(None, None, None)
    assert threads() == before
