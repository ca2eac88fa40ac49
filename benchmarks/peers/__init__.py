"""gcml-ray beside other frameworks: the same model, data and steps, only the orchestration differs."""
