"""The one way ONNX files are run: on the CPU, by one thread that never spins.

More threads cost more than they bring on a site's small machines: with two on two cores the
99th percentile rose from under a millisecond to several. Imports onnxruntime late, for it is
heavy, and what needs no model must not pay for it.
"""

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

METADATA_KEY: Final = "pointsman"
"""Under which a file of ours tells of itself, as JSON."""


class SessionError(ValueError):
    """A file that the runtime cannot run; its text is the runtime's reason, on one line."""


def open_session(content: bytes | str) -> "InferenceSession":
    """Load a model, given as bytes or as the path of its file.

    Raises:
        ModuleNotFoundError: onnxruntime is not installed.
        SessionError: the file cannot be run.

    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # what is wrong is told by the exception
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    # What it raises for a broken file is of many classes without a common base.
    except Exception as error:
        raise SessionError(" ".join(str(error).split())) from error
