from __future__ import annotations

from shoal.cluster.failures import explain, missing_resources
from shoal.errors import ModelError, Unavailable

TRACEBACK = """The deployment failed to start 1 times in a row. Error:
ray::ServeReplica:shoal:decode.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "replica.py", line 1234, in initialize
    self._user_callable_asgi_app = await self._initialize()
RuntimeError: Traceback (most recent call last):
  File "files.py", line 62, in locate
    raise ModelError(text)
{last}
"""


def test_an_error_of_ours_keeps_its_class_and_message():
    error = explain(TRACEBACK.format(last="shoal.errors.ModelError: there is no model 'x':\ngive a folder"))
    assert type(error) is ModelError
    assert error.message == "there is no model 'x':\ngive a folder"


def test_any_other_error_is_told_whole():
    error = explain(TRACEBACK.format(last="MemoryError"))
    assert type(error) is Unavailable
    assert "could not start" in error.message and "MemoryError" in error.message


def test_a_name_that_only_looks_like_ours_is_told_whole():
    assert type(explain("shoal.errors.annotations: no error")) is Unavailable


def test_a_cluster_with_everything_lacks_nothing():
    assert missing_resources({"CPU": 2, "prefill": 1}, {"CPU": 2.0, "prefill": 1.0, "memory": 1e9}) is None


def test_what_a_cluster_lacks_is_named_with_what_to_do():
    text = missing_resources({"CPU": 4, "GPU": 1, "prefill": 2, "decode": 1}, {"CPU": 2.0, "prefill": 1, "decode": 1})
    assert text is not None
    assert "2 CPU" in text and "1 GPU" in text and "1 prefill" in text
    assert """ray start --resources '{"prefill": 2}'""" in text
    assert "lower prefill.num_cpus" in text and "nodes with GPUs" in text
