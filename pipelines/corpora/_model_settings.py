"""Settings of corpora that read text through a language model: which one, where it lies, how it computes."""

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from pipelines.corpora import CorpusSettings
from pipelines.corpora import _language_models as models
from pipelines.corpora import _model_folders as folders
from pipelines.errors import Refused


class ModelSettings(CorpusSettings):
    # Where a model lies differs between machines, so only its digest is kept with the rows.
    model: str | None = Field(
        None, exclude=True, description="folder with config.json and *.safetensors, or a name on the Hugging Face hub"
    )
    gguf_file: str | None = Field(None, exclude=True, description="file in that folder, for models in GGUF")
    revision: str | None = Field(None, exclude=True, description="branch, tag or commit of a hub name")
    model_digest: str | None = Field(None, description="follows from the model; another model is refused")
    precision: models.Precision = Field("float32", description="in which the model computes")
    gpus: float = Field(0, ge=0, le=1, description="CUDA devices of each worker (0.5: two share one); 0: the CPU")

    @field_validator("model")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        # Workers do not share the working directory of who gave the path.
        if value is not None and "://" not in value and (folder := Path(value).expanduser()).is_dir():
            return str(folder.absolute())
        return value

    def inspect(self) -> tuple[models.ModelShape, str]:
        """(shape, digest) of the model, before its weights are loaded.

        Raises:
            Refused: no model is named, it cannot be read safely, or it is not the one these settings were made with.
        """
        shape = models.shape_of(*self._place())
        digest = folders.fingerprint(folders.find(*self._place()), self.gguf_file)
        if self.model_digest not in (None, digest):
            raise Refused(
                f"model={self.model} is another model than these settings were made with: its digest is {digest}, "
                f"and model_digest={self.model_digest}. Give the same model, or leave model_digest out."
            )
        return shape, digest

    def open_tokenizer(self) -> Any:
        return models.open_tokenizer(*self._place())

    def open_model(self) -> models.LanguageModel:
        return models.open_model(*self._place(), precision=self.precision, gpus=self.gpus)

    def _place(self) -> tuple[str, str | None, str | None]:
        if self.model is None:
            raise Refused("no model was named: --set model=FOLDER (config.json, *.safetensors, a tokenizer) or =NAME.")
        return self.model, self.gguf_file, self.revision
