"""The formatter: a question and its answer, until you write something else."""

from qlora_kit import FormatterBase, Segment


class MyFormatFormatter(FormatterBase):
    """Rows with a ``question`` and an ``answer``."""

    name = "my-format"
    roles = ("question", "answer")

    def segments(self, row):
        """A row's text in order; what is trained carries loss."""
        return [
            Segment(f"Q: {row['question']}\nA: "),
            Segment(row["answer"], is_trained=True),
        ]
