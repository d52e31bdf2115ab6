"""The form that an answer must have: any text, a JSON object, or JSON of a schema."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from deltacome.serve.http.fields import UNUSED, Strict, Text


class TextFormat(BaseModel):
    model_config = Strict
    type: Literal["text"]

    @property
    def schema_of_answers(self) -> None:
        """Any text will do."""


class ObjectFormat(BaseModel):
    model_config = Strict
    type: Literal["json_object"]

    @property
    def schema_of_answers(self) -> dict[str, Any]:
        """A JSON schema."""
        return {"type": "object"}


class NamedSchema(BaseModel):
    model_config = Strict
    name: Text = Field(description=UNUSED)
    description: Text | None = Field(None, description=UNUSED)
    json_schema: dict[str, Any] | None = Field(None, alias="schema", description="Any object if left out.")
    strict: bool | None = Field(None, description="The schema is kept to, whatever this says.")


class SchemaFormat(BaseModel):
    model_config = Strict
    type: Literal["json_schema"]
    json_schema: NamedSchema

    @property
    def schema_of_answers(self) -> dict[str, Any]:
        """A JSON schema."""
        found = self.json_schema.json_schema
        return {"type": "object"} if found is None else found


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]
