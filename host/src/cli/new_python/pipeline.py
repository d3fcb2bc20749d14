"""What this model does. The host makes batches of whatever callers send, and calls `predict` with each."""

from pydantic import BaseModel, Field


class Input(BaseModel):
    """What a caller sends; what doesn't fit is answered with 422 and never comes here."""

    text: str = Field(min_length=1)


class Output(BaseModel):
    """What a caller gets, beside `status`."""

    text: str
    letters: int


class Pipeline:
    """Loaded once for each replica."""

    def __init__(self, all_model_data_folder, shout=True):
        # Load the model here: from `all_model_data_folder`, or from beside this file. Other arguments are keys of the model's entry.
        self.shout = shout

    def predict(self, inputs: list[Input]) -> list[Output]:
        """One output for each input, in their order. An exception fails the input that causes it, and no other."""
        texts = [item.text.upper() if self.shout else item.text for item in inputs]
        return [Output(text=text, letters=sum(letter.isalpha() for letter in text)) for text in texts]
