"""How numpy's linear algebra is made to run with one thread, and what it is called."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from hsa.outputs.recording import libraries
from hsa.system import lapack


def blas_threads() -> set[int]:
    return {
        each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas" and "numpy" in each["filepath"]
    }


def test_blas_has_one_thread_until_the_last_has_left() -> None:
    before = blas_threads()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with lapack.one_thread:
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with lapack.one_thread:
        assert blas_threads() == {1}
        thread.start()
        assert inside.wait(10)
    assert blas_threads() == {1}
    leave.set()
    thread.join()
    assert blas_threads() == before


def test_an_error_inside_sets_the_threads_back() -> None:
    with threadpool_limits(2):
        before = blas_threads()
        with pytest.raises(RuntimeError, match="inside"), lapack.one_thread:
            raise RuntimeError("inside")
        assert blas_threads() == before


def test_the_record_names_the_library_with_its_version() -> None:
    described = lapack.description()
    assert libraries(["lapack"])["lapack"] == described
    assert "lapack" not in libraries()
    assert len(described.split()) >= 2
    assert np.show_config(mode="dicts")["Build Dependencies"]["lapack"]["version"][:3] in described
