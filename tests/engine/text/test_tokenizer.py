from engine.config import EngineArgs
from engine.hub import ResolvedModel
from engine.text.tokenizer import load_tokenizer


def test_a_tokenizer_from_the_file_and_one_from_its_folder_give_the_same_ids(smollm2, tiny_model_dir):
    folder = tiny_model_dir("llama")
    from_file = load_tokenizer(smollm2, EngineArgs("smollm2"))
    from_folder = load_tokenizer(ResolvedModel("tiny", folder, "folder"), EngineArgs("tiny"))
    text = "<|im_start|>user\nA  B\t12345 é漢字🙂"
    assert from_file.encode(text) == from_folder.encode(text)
    assert from_file.decode(from_file.encode(text), skip_special_tokens=False) == text
