//! Pipelines in Python: a folder in a volume serves, its inputs are what pydantic says, and what its code does harms nobody else.

mod confined;
mod examples;
mod library;
mod streams;
mod tensors;

use std::{fs, path::Path, process::Command, thread, time::Duration};

use modalkit_tests::{Host, Setup, built, python::write, wait_until};
use serde_json::{Value, json};

const SENTIMENT: &str = r#"
import logging
from pydantic import BaseModel, Field
from modalkit.inference_pipeline import InferencePipeline
from modalkit.iomodel import InferenceOutputModel


class Text(BaseModel):
    text: str = Field(max_length=20)
    weight: int = 1


class Label(InferenceOutputModel):
    label: str
    weight: int
    batch: int
    told: dict


class Sentiment(InferencePipeline):
    def __init__(self, model_name, all_model_data_folder, common_settings, *args, **kwargs):
        super().__init__(model_name, all_model_data_folder, common_settings, *args, **kwargs)
        self.told = {"model": model_name, "common": common_settings, **kwargs}
        self.reloads = 0

    def on_volume_reload(self):
        self.reloads += 1

    def preprocess(self, input_list: list[Text]) -> dict:
        return {"texts": [item.text for item in input_list]}

    def predict(self, input_list, preprocessed_data):
        if "raise" in preprocessed_data["texts"]:
            raise ValueError("told to raise")
        return ["good" if "good" in text else "bad" for text in preprocessed_data["texts"]]

    def postprocess(self, input_list, raw_output):
        logging.getLogger("sentiment").warning("%d inputs", len(input_list))
        told = {**self.told, "reloads": self.reloads}
        return [
            Label(status="success", label=label, weight=item.weight, batch=len(input_list), told=told)
            for item, label in zip(input_list, raw_output)
        ]
"#;

fn ask(host: &Host, model: &str, body: &Value) -> (u16, Value) {
    host.post(&format!("/predict_sync?model_name={model}"), body)
}

#[test]
fn a_folder_in_a_volume_serves_by_the_librarys_rules() {
    let config = "[app_settings.batch_config]\nmax_batch_size = 32\nwait_ms = 20\n\
         [model_settings.common]\nlanguage = \"en\"\n\
         [model_settings.model_entries.sentiment]\nthreshold = 0.5\n";
    let host = Setup::new().python("sentiment", &[("pipeline.py", SENTIMENT)]).config(config).ready();
    let (status, answer) = ask(&host, "sentiment", &json!({"text": "a good day", "weight": "7"}));
    assert_eq!(status, 200, "{answer}");
    let told = json!({"model": "sentiment", "common": {"language": "en"}, "threshold": 0.5, "reloads": 0});
    assert_eq!(answer, json!({"status": "success", "label": "good", "weight": 7, "batch": 1, "told": told}));
    let line = host.log_line("1 inputs");
    assert_eq!(
        (&line["level"], &line["model"], &line["from"]),
        (&json!("WARN"), &json!("sentiment"), &json!("sentiment"))
    );

    // Pydantic's own words.
    let (status, answer) = ask(&host, "sentiment", &json!({"text": "x".repeat(21), "weight": "a"}));
    assert_eq!(status, 422, "{answer}");
    let of = |at: usize| (answer["detail"][at]["loc"].clone(), answer["detail"][at]["type"].clone());
    assert_eq!(of(0), (json!(["body", "text"]), json!("string_too_long")));
    assert_eq!(of(1), (json!(["body", "weight"]), json!("int_parsing")));
    assert_eq!(answer["detail"][0]["msg"], "String should have at most 20 characters");

    // One that raises among others, one that is invalid, and a list of which one is.
    let items: Vec<Value> = (0..32)
        .map(|place| match place {
            3 => json!({"text": 3}),
            17 => json!({"text": "raise"}),
            _ => json!({"text": format!("good {place}")}),
        })
        .collect();
    let answers: Vec<(u16, Value)> = thread::scope(|scope| {
        let asked: Vec<_> = items.iter().map(|item| scope.spawn(|| ask(&host, "sentiment", item))).collect();
        asked.into_iter().map(|asked| asked.join().unwrap()).collect()
    });
    for (place, (status, answer)) in answers.iter().enumerate() {
        let expected =
            [(3, 422), (17, 500)].iter().find(|(at, _)| *at == place).map_or(200, |(_, status)| *status);
        assert_eq!(*status, expected, "{place}: {answer}");
    }
    assert!(
        answers[17].1["detail"].as_str().unwrap().contains("ValueError: told to raise"),
        "{:?}",
        answers[17]
    );
    let traceback = host.logged("the traceback", |line| line["message"].to_string().contains("Traceback"));
    let text = traceback["message"].as_str().unwrap();
    assert!(text.contains("pipeline.py\", line") && !text.contains("modalkit_worker"), "{text}");
    let (status, answer) = host.post("/predict_batch?model_name=sentiment", &json!(items[..4]));
    assert_eq!((status, &answer["detail"][0]["loc"]), (422, &json!(["body", 3, "text"])), "{answer}");

    let job = host.job("sentiment", &json!({"message": {"text": "good"}}));
    assert_eq!(host.ended(&job)["result"]["label"], "good");
    fs::write(host.volume().join("sentiment/words.txt"), "x").unwrap();
    wait_until("the hook ran", || ask(&host, "sentiment", &json!({"text": ""})).1["told"]["reloads"] == 1);
}

#[test]
fn other_shapes_of_code_serve_and_a_users_module_is_in_nobodys_way() {
    let function = "import numpy\n\ndef predict(batch):\n    return [{'sum': numpy.sum(item['numbers'])} for item in batch]\n";
    let asynchronous = "import asyncio\nimport struct\n\nclass Model:\n    def __init__(self, greeting='hello'):\n        self.greeting = greeting\n\n    async def predict(self, batch):\n        await asyncio.sleep(0)\n        return [{'said': f\"{self.greeting} {item['name']} {struct.WORD}\"} for item in batch]\n";
    let config = "[model_settings.model_entries.greeter]\ngreeting = \"hi\"\n[model_settings.model_entries.greeter.python]\npipeline = \"inside.model:Model\"\n";
    let host = Setup::new()
        .python("adder", &[("pipeline.py", function)])
        .python(
            "greeter",
            // It hides the standard library's from nobody but the user's own code, which may have it so.
            &[("pipeline.py", ""), ("inside/model.py", asynchronous), ("struct.py", "WORD = 'mine'\n")],
        )
        .config(config)
        .start();
    wait_until("the first serves", || ask(&host, "adder", &json!({"numbers": [1, 2.5]})).0 == 200);
    assert_eq!(ask(&host, "adder", &json!({"numbers": [1, 2.5]})).1["sum"], 3.5);
    wait_until("the second has an end", || host.model("greeter")["state"] != "loading");
    // `struct` was imported before the folder was looked into.
    let reason = host.model("greeter")["reason"].to_string();
    let (status, answer) = ask(&host, "greeter", &json!({"name": "Ann"}));
    assert_eq!(status, 500, "{reason} {answer}");
    assert!(answer["detail"].as_str().unwrap().contains("AttributeError"), "{answer}");
    write(
        &host.volume().join("greeter"),
        &[("inside/model.py", &asynchronous.replace("{struct.WORD}", "!"))],
    );
    wait_until("the change serves", || {
        ask(&host, "greeter", &json!({"name": "Ann"})).1["said"] == "hi Ann !"
    });
}

#[test]
fn changed_code_is_a_new_generation_and_one_that_raises_leaves_the_old_one_serving() {
    let version = |number: u32| {
        format!(
            "from helper import WORD\n\ndef predict(batch):\n    return [{{'version': {number}, 'word': WORD}} for _ in batch]\n"
        )
    };
    let files: [(&str, &str); 2] = [("pipeline.py", &version(1)), ("helper.py", "WORD = 'a'\n")];
    let host = Setup::new().python("counter", &files).ready();
    let folder = host.volume().join("counter");
    let served = || ask(&host, "counter", &json!({})).1;
    wait_until("the first serves", || served()["version"] == 1);
    write(&folder, &[("pipeline.py", &version(2)), ("helper.py", "WORD = 'b'\n")]);
    wait_until("the second serves", || served()["version"] == 2);
    assert_eq!(served()["word"], "b");
    write(&folder, &[("helper.py", "raise RuntimeError('not today')\n")]);
    wait_until("it was refused", || {
        let last = host.report("counter")["last"].clone();
        last["reason"].to_string().contains("RuntimeError: not today")
    });
    let reason = host.report("counter")["last"]["reason"].to_string();
    assert!(reason.contains("helper.py") && reason.contains("line 1"), "{reason}");
    assert_eq!(served()["version"], 2);
    write(&folder, &[("helper.py", "WORD = 'c'\n")]);
    wait_until("a fit one serves", || served()["word"] == "c");
    let back = host.post("/models/counter/rollback", &json!({}));
    assert_eq!(back.0, 200, "{back:?}");
    assert_eq!(served()["word"], "b", "of its own copy");
}

#[test]
fn code_that_ends_its_process_or_hangs_costs_its_own_caller_alone() {
    let killer = "import ctypes, os, sys, threading, time\n\nlock = threading.Lock()\n\ndef deep(n):\n    return deep(n + 1)\n\ndef predict(batch):\n    for item in batch:\n        what = item.get('do')\n        if what == 'segfault':\n            ctypes.string_at(0)\n        elif what == 'leave':\n            print('last words')\n            os._exit(3)\n        elif what == 'exit':\n            sys.exit('no more')\n        elif what == 'hang':\n            time.sleep(60)\n        elif what == 'lock':\n            thread = threading.Thread(target=lock.acquire)\n            thread.start()\n            thread.join()\n            lock.acquire()\n        elif what == 'kill':\n            os.kill(os.getpid(), 9)\n        elif what == 'fork':\n            os.fork()\n        elif what == 'recursion':\n            deep(0)\n        elif what == 'print':\n            print('x' * 3_000_000)\n        elif what == 'child' and os.fork() == 0:\n            os.setsid()\n            time.sleep(600)\n    return [{'value': 2 * item['value']} for item in batch]\n";
    let config = "[app_settings.batch_config]\nmax_batch_size = 8\nwait_ms = 30\n[app_settings.deployment_config]\nbatch_timeout_seconds = 1.0\n";
    let mut host = Setup::new().python("killer", &[("pipeline.py", killer)]).config(config).ready();
    wait_until("it serves", || ask(&host, "killer", &json!({"value": 1})).0 == 200);
    for (what, expected) in [
        ("segfault", "SIGSEGV"),
        ("leave", "exit"),
        ("exit", "SystemExit: no more"),
        ("hang", "batch_timeout_seconds"),
        ("lock", "batch_timeout_seconds"),
        // As the kernel does for want of memory: it takes more than two times to be sure.
        ("kill", "SIGKILL"),
        ("recursion", "RecursionError"),
    ] {
        let items: Vec<Value> =
            (0..8).map(|value| json!({"value": value, "do": if value == 5 { what } else { "" }})).collect();
        let answers: Vec<(u16, Value)> = thread::scope(|scope| {
            let asked: Vec<_> = items.iter().map(|item| scope.spawn(|| ask(&host, "killer", item))).collect();
            asked.into_iter().map(|asked| asked.join().unwrap()).collect()
        });
        for (value, (status, answer)) in answers.iter().enumerate() {
            if value == 5 {
                assert!(
                    *status >= 500 && answer["detail"].to_string().contains(expected),
                    "{what}: {status} {answer}"
                );
            } else {
                assert_eq!((*status, &answer["value"]), (200, &json!(2 * value)), "{what}: {answer}");
            }
        }
    }
    let deaths = host.metric(r#"modalkit_worker_deaths_total{model="killer"}"#);
    assert!(deaths <= 2.0 * 6.0 + 4.0, "{deaths} deaths for six killers, and one that was killed");
    let _ = host.log_line("last words");
    let _ = host
        .logged("the stack at the fault", |line| line["message"].to_string().contains("Fatal Python error"));
    // Where it hung, and where it waits for a lock whose holder is gone, by lines of the file.
    let line_of = |text: &str| 1 + killer.lines().position(|line| line.contains(text)).unwrap();
    for line in [line_of("time.sleep(60)"), line_of("            lock.acquire()")] {
        let place = format!("pipeline.py\", line {line} in predict");
        let _ = host.logged("the stack of a hang", |line| line["message"].as_str().unwrap().contains(&place));
    }
    // A child that comes back from the pipeline answers nobody.
    for value in 0..5 {
        assert_eq!(ask(&host, "killer", &json!({"value": value, "do": "fork"})).1["value"], 2 * value);
    }
    for what in ["print", "child"] {
        assert_eq!(ask(&host, "killer", &json!({"value": 4, "do": what})).1["value"], 8, "{what}");
    }
    let interpreters = || {
        let commands = fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
        let mark = host_folder(&host);
        commands.filter(|line| String::from_utf8_lossy(line).contains(&mark)).count()
    };
    assert!(interpreters() >= 2, "an interpreter, and its child");
    host.kill();
    thread::sleep(Duration::from_secs(1));
    let commands = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    let mark = host_folder(&host);
    assert_eq!(
        commands.filter(|line| String::from_utf8_lossy(line).contains(&mark)).count(),
        0,
        "a second later"
    );
}

/// What the command lines of a host's interpreters have in common.
fn host_folder(host: &Host) -> String {
    host.temporary_folder().join("modalkit-plugins-").display().to_string()
}

/// As the library's README prints them.
const MODEL: &str = include_str!("../../python_library/model.py");
const APP: &str = include_str!("../../python_library/app.py");
/// Modules by their later names.
const NEW_NAMES: [(&str, &str); 3] = [
    ("modalkit.inference ", "modalkit.inference_pipeline "),
    ("modalkit.modalapp ", "modalkit.modal_service "),
    ("modalkit.modalutils ", "modalkit.modal_config "),
];

#[test]
fn what_the_python_librarys_readme_prints_serves_as_it_is_and_answers_what_calling_it_answers() {
    let renamed =
        |text: &str| NEW_NAMES.iter().fold(text.to_owned(), |text, (old, new)| text.replace(old, new));
    let both = format!("{MODEL}\n{APP}");
    let model = renamed(MODEL);
    assert!(model != MODEL && renamed(APP) != APP);
    let importing = renamed(&format!("from model import TextInput, TextOutput, TranslationModel\n{APP}"));
    let host = Setup::new()
        .python("as_printed", &[("app.py", &both)])
        .python("model_alone", &[("pipeline.py", MODEL)])
        .python("with_new_names", &[("app.py", &importing), ("model.py", &model)])
        .config("[model_settings.common]\ndevice = \"cpu\"\n[model_settings.model_entries.as_printed]\nmodel_path = \"path/to/model.pt\"\nvocab_size = 50000\n")
        .start();
    // What the class says where nobody serves it.
    let script = format!(
        "{MODEL}\nmodel = TranslationModel('m', '', {{}})\nfor output in model.run_inference([TextInput(text='Hello world'), TextInput(text='b', language='de')]): print(output.model_dump_json())\n"
    );
    let library = format!("import sys; sys.path.insert(0, {:?})\n{script}", shim(&host));
    let said = python(&library);
    let direct: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(direct[0], json!({"translated_text": "HELLO WORLD", "confidence": 0.95}));
    for name in ["as_printed", "model_alone", "with_new_names"] {
        wait_until("it serves", || ask(&host, name, &json!({"text": "Hello world"})).0 == 200);
        for (input, mut expected) in [json!({"text": "Hello world"}), json!({"text": "b", "language": "de"})]
            .iter()
            .zip(direct.clone())
        {
            expected["status"] = json!("success");
            assert_eq!(ask(&host, name, input), (200, expected), "{name}");
        }
    }
}

/// What is put beside the code of users, wherever this host has it.
fn shim(host: &Host) -> String {
    let folders = fs::read_dir(host.temporary_folder()).unwrap().flatten();
    let copies = folders.flat_map(|folder| fs::read_dir(folder.path()).into_iter().flatten().flatten());
    let found = copies.map(|copy| copy.path().join("shim")).find(|path| path.is_dir());
    found
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../host/worker/python/shim"))
        .display()
        .to_string()
}

/// What this program prints.
fn python(program: &str) -> String {
    let interpreter = built().with_file_name("python").join("bin/python");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../host/worker/python");
    let output = Command::new(interpreter)
        .args(["-c", program])
        .env("PYTHONPATH", folder)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

const CHECKED: &str = r#"
from typing import Literal, Optional, Union
from pydantic import BaseModel, Field, field_validator


class Inner(BaseModel):
    name: str = Field(min_length=1, max_length=5)
    sizes: list[int] = Field(default_factory=list, max_length=3)


class Input(BaseModel):
    kind: Literal["a", "b"]
    number: int = Field(ge=-5, le=5)
    ratio: Optional[float] = None
    inner: Union[Inner, str, None] = None
    flag: bool = False

    @field_validator("flag")
    @classmethod
    def never_with_force(cls, flag):
        assert flag is not True, "no flags today"
        return flag


def predict(batch: list[Input]):
    return [{"read": item.model_dump(mode="json")} for item in batch]
"#;

/// Something that is nearly an input, or nothing like it.
fn nearly(random: &mut fastrand::Rng) -> String {
    let any = |random: &mut fastrand::Rng| -> Value {
        let values = [
            json!("a"),
            json!("b"),
            json!("7"),
            json!(3),
            json!(-9),
            json!(2.5),
            json!(null),
            json!(true),
            json!("true"),
            json!([]),
            json!([1, "2", 3.0]),
            json!([1, 2, 3, 4]),
            json!({"name": "ann"}),
            json!({"name": "", "sizes": ["x"]}),
            json!({}),
            json!("0"),
        ];
        values[random.usize(..values.len())].clone()
    };
    let mut input = json!({"kind": "a", "number": 3});
    for _ in 0..random.usize(..4) {
        let member = ["kind", "number", "ratio", "inner", "flag", "other"][random.usize(..6)];
        input[member] = any(random);
    }
    match random.usize(..20) {
        0 => any(random).to_string(),
        1 => input.to_string().replacen(',', "", 1),
        2 => input.to_string().replacen("number", "numb\u{e9}r", 1),
        _ => input.to_string(),
    }
}

#[test]
fn each_inputs_verdict_is_pydantics_own() {
    let cases =
        std::env::var("MODALKIT_TEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(1_000_usize);
    let mut random = fastrand::Rng::with_seed(19);
    let inputs: Vec<String> = (0..cases).map(|_| nearly(&mut random)).collect();
    let host = Setup::new().python("checked", &[("pipeline.py", CHECKED)]).ready();
    let file = host.folder().join("inputs.json");
    fs::write(&file, serde_json::to_string(&inputs).unwrap()).unwrap();
    let program = format!(
        "import json\n{CHECKED}\nfrom pydantic import ValidationError\nfor text in json.load(open({file:?})):\n    try:\n        print(json.dumps({{'read': Input.model_validate_json(text).model_dump(mode='json')}}))\n    except ValidationError as error:\n        print(json.dumps({{'faults': [[list(said['loc']), said['msg'], said['type']] for said in error.errors()][:16]}}))\n"
    );
    let verdicts: Vec<Value> =
        python(&program).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(verdicts.len(), inputs.len());
    wait_until("it serves", || ask(&host, "checked", &json!({"kind": "a", "number": 1})).0 == 200);
    let mut invalid = 0;
    for (input, verdict) in inputs.iter().zip(&verdicts) {
        let (status, answer) = host.post_text("/predict_sync?model_name=checked", input);
        if let Some(read) = verdict.get("read") {
            assert_eq!((status, &answer["read"]), (200, read), "{input}");
            continue;
        }
        invalid += 1;
        assert_eq!(status, 422, "{input}: {answer}");
        let told: Vec<Value> = answer["detail"]
            .as_array()
            .unwrap()
            .iter()
            .map(|detail| json!([detail["loc"].as_array().unwrap()[1..], detail["msg"], detail["type"]]))
            .collect();
        assert_eq!(json!(told), verdict["faults"], "{input}");
    }
    assert!(invalid > cases / 10 && invalid < cases, "{invalid} of {cases} are invalid");
}

#[test]
fn a_new_folder_serves_passes_its_tests_and_is_served_from_wherever_it_lies() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("letters");
    let modalkit = |arguments: &[&str]| {
        let output = Command::new(built().join("modalkit")).args(arguments).output().unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr),
        )
    };
    let path = place.to_str().unwrap();
    let (code, said) = modalkit(&["new", path, "--python"]);
    assert!(code == Some(0) && said.contains("pipeline.py"), "{said}");
    let (code, said) = modalkit(&["new", path, "--python"]);
    assert!(code == Some(1) && said.contains("File exists"), "nothing is overwritten: {said}");
    let (code, said) = modalkit(&["new", folder.path().join("no name").to_str().unwrap(), "--python"]);
    assert!(code == Some(2) && said.contains("\"no name\""), "{said}");
    std::os::unix::fs::symlink(built().with_file_name("python"), place.join(".venv")).unwrap();

    // Its own tests, by the one module of pytest that they use.
    let program = format!(
        "import sys, types, contextlib\nsys.path.insert(0, {path:?})\n@contextlib.contextmanager\ndef raises(kind):\n    try:\n        yield\n    except kind:\n        return\n    raise AssertionError('nothing was raised')\nsys.modules['pytest'] = types.SimpleNamespace(raises=raises)\nimport test_pipeline\n[getattr(test_pipeline, name)() for name in dir(test_pipeline) if name.startswith('test_')]\n"
    );
    python(&program);
    let config = format!(
        "[model_settings.model_entries.letters]\nshout = false\n[model_settings.model_entries.letters.python]\nfolder = {path:?}\n"
    );
    let host = Setup::new().config(&config).start();
    wait_until("it serves", || ask(&host, "letters", &json!({"text": "a b"})).0 == 200);
    assert_eq!(
        ask(&host, "letters", &json!({"text": "a b"})).1,
        json!({"status": "success", "text": "a b", "letters": 2})
    );
    let changed = fs::read_to_string(place.join("pipeline.py"))
        .unwrap()
        .replace("letter.isalpha()", "not letter.isspace()");
    write(&place, &[("pipeline.py", &changed)]);
    wait_until("the change serves", || ask(&host, "letters", &json!({"text": "a 7"})).1["letters"] == 2);
    let (code, said) =
        modalkit(&["--config", host.folder().join("modalkit.toml").to_str().unwrap(), "check"]);
    assert!(code == Some(0) && said.contains("letters: Python 3.") && said.contains("pydantic 2."), "{said}");
    // One that no entry names is looked at as well.
    write(&host.volume().join("odd"), &[("pipeline.py", "def predict(batch)\n    return batch\n")]);
    let (code, said) =
        modalkit(&["--config", host.folder().join("modalkit.toml").to_str().unwrap(), "check"]);
    assert!(code == Some(1) && said.contains("SyntaxError") && said.contains("def predict(batch)"), "{said}");
}

#[test]
fn the_same_code_in_two_folders_is_two_plugins() {
    let code = "def predict(batch):\n    return [{'file': __file__} for _ in batch]\n";
    let host =
        Setup::new().python("one", &[("pipeline.py", code)]).python("two", &[("pipeline.py", code)]).ready();
    for name in ["one", "two"] {
        wait_until("it serves", || ask(&host, name, &json!({})).0 == 200);
        let file = host.volume().join(name).join("pipeline.py");
        assert_eq!(ask(&host, name, &json!({})).1["file"], json!(file));
    }
}

#[test]
fn a_folder_of_data_a_late_file_and_a_deep_body_are_in_nobodys_way() {
    let code = "import importlib, os\n\nclass Model:\n    def predict(self, batch):\n        answers = []\n        for item in batch:\n            try:\n                importlib.import_module('late')\n                late = True\n            except ImportError:\n                late = False\n            answers.append({'late': late, 'not_a_number': float('nan'), 'token': os.environ['hub_token'], 'status': None, 'data': open('model/data.bin').read()})\n        return answers\n";
    let config = "[app_settings.deployment_config]\nsecrets = [\"hub_token\"]\nallow_concurrent_inputs = 8\n[model_settings.model_entries.odd]\n";
    let host = Setup::new()
        .variable("hub_token", "t0ken-of-python")
        .python("odd", &[("app.py", code), ("model/data.bin", "weights")])
        .config(config)
        .ready();
    // Neither looked at nor copied.
    fs::write(host.volume().join("odd/late.pyc"), "x").unwrap();
    let expected = json!({"status": "success", "late": false, "not_a_number": null, "token": "t0ken-of-python", "data": "weights"});
    wait_until("it serves", || ask(&host, "odd", &json!({})).0 == 200);
    assert_eq!(ask(&host, "odd", &json!({})), (200, expected));
    for body in ["[".repeat(5_000), "{\"a\":".repeat(2_000), "nothing".into()] {
        let (status, answer) = host.post_text("/predict_sync?model_name=odd", &body);
        assert_eq!((status, &answer["detail"][0]["type"]), (422, &json!("json_invalid")), "{answer}");
    }
    assert_eq!(host.metric(r#"modalkit_worker_deaths_total{model="odd"}"#), 0.0);
}
