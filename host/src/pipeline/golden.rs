//! Golden requests: inputs with the answers that a new generation must give before it serves. It owns their file's form and
//! the comparison, and never decides what follows from a wrong answer.
//!
//! The file is a JSON list of `{"input": {…}, "output": {…}, "tolerance": 0.001}`. `output` is the pipeline's whole output; numbers in it may differ by `tolerance`, which is 0 where it isn't given.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use modalkit_engine::{Failure, FailureKind, Instance, Payload};
use serde::Deserialize;
use serde_json::{Value, value::RawValue};

use super::stages::{Ended, NoCallers, StageTimes, stages};

/// What a model's golden file holds.
pub struct Golden {
    cases: Vec<Case>,
    latency_max: Option<Duration>,
}

struct Case {
    input: Payload,
    output: Value,
    tolerance: f64,
}

/// A case as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    input: Box<RawValue>,
    output: Value,
    #[serde(default)]
    tolerance: f64,
}

/// Each request's time is the median of this many answers, after the first, which is looked at and not timed.
const TIMED_ANSWERS: usize = 3;

/// Why a generation didn't pass; places count from 0.
#[derive(Debug, thiserror::Error)]
pub enum GoldenError {
    /// The file can't be read.
    #[error("can't read the golden requests {}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The file has another form.
    #[error("the golden requests {} are not a JSON list of {{\"input\", \"output\", \"tolerance\"?}}", path.display())]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
    /// There was no answer.
    #[error("golden request {place} was not answered: {reason}")]
    Failed {
        /// Which.
        place: usize,
        /// What the pipeline said.
        reason: String,
    },
    /// The answer was another.
    #[error("golden request {place} was answered wrongly: at {at}, expected {expected}, found {found}")]
    Wrong {
        /// Which.
        place: usize,
        /// Where in the answer, as a JSON pointer.
        at: String,
        /// What the file says.
        expected: String,
        /// What was answered.
        found: String,
    },
    /// The answer took too long.
    #[error("golden request {place} took {took:?}; expected at most {limit:?} (golden_latency_ms)")]
    Slow {
        /// Which.
        place: usize,
        /// The median of some answers.
        took: Duration,
        /// The limit.
        limit: Duration,
    },
    /// They were not through in time.
    #[error(
        "the golden requests were not answered within {limit:?} (load_timeout_seconds); their thread is left behind"
    )]
    Hung {
        /// The limit.
        limit: Duration,
    },
}

impl Golden {
    /// Reads the file.
    ///
    /// # Errors
    /// It can't be read, or has another form.
    pub fn read(path: &Path, latency_max: Option<Duration>) -> Result<Self, GoldenError> {
        let text = std::fs::read(path)
            .map_err(|source| GoldenError::Unreadable { path: path.to_owned(), source })?;
        let cases: Vec<Written> = serde_json::from_slice(&text)
            .map_err(|source| GoldenError::Malformed { path: path.to_owned(), source })?;
        let case = |Written { input, output, tolerance }| {
            let input = Payload::Json(Box::<str>::from(input).into_string().into());
            Case { input, output, tolerance }
        };
        Ok(Self { cases: cases.into_iter().map(case).collect(), latency_max })
    }

    /// Asks an instance, each request as a batch of its own; takes as long as the plugin does.
    ///
    /// # Errors
    /// The first request that isn't answered as the file says.
    pub fn ask(&self, instance: &dyn Instance) -> Result<(), GoldenError> {
        for (place, case) in self.cases.iter().enumerate() {
            let answer = |failure: Failure| GoldenError::Failed { place, reason: failure.message };
            let found = answer_of(instance, case).map_err(answer)?;
            if let Some((at, expected, found)) = difference(&case.output, &found, case.tolerance, "") {
                return Err(GoldenError::Wrong { place, at, expected, found });
            }
            let Some(limit) = self.latency_max else { continue };
            let mut times = Vec::with_capacity(TIMED_ANSWERS);
            for _ in 0..TIMED_ANSWERS {
                let begun = Instant::now();
                answer_of(instance, case).map_err(answer)?;
                times.push(begun.elapsed());
            }
            times.sort();
            let took = times[TIMED_ANSWERS / 2];
            if took > limit {
                return Err(GoldenError::Slow { place, took, limit });
            }
        }
        Ok(())
    }
}

fn answer_of(instance: &dyn Instance, case: &Case) -> Result<Value, Failure> {
    let failure = |message: String| Failure { kind: FailureKind::Permanent, message };
    let turned_down = |rejection| failure(format!("the input was turned down: {rejection:?}"));
    let decoded = instance.decode(&case.input).map_err(turned_down)?;
    let output = match stages(instance, vec![decoded], &mut StageTimes::default(), &mut NoCallers)?.pop() {
        Some(Ended::Outcome(outcome)) => outcome?,
        Some(Ended::Rejected(rejection)) => return Err(turned_down(rejection)),
        None => return Err(failure("the plugin returned no outcome".into())),
    };
    serde_json::from_slice(&output.into_json()?).map_err(|error| failure(error.to_string()))
}

/// The first place where two values differ: where, what was expected, what was found.
fn difference(expected: &Value, found: &Value, tolerance: f64, at: &str) -> Option<(String, String, String)> {
    let differ = || Some((place(at), brief(Some(expected)), brief(Some(found))));
    match (expected, found) {
        (Value::Object(expected), Value::Object(found)) => {
            for key in expected.keys().chain(found.keys()) {
                let at = format!("{at}/{key}");
                match (expected.get(key), found.get(key)) {
                    (Some(expected), Some(found)) => {
                        if let Some(difference) = difference(expected, found, tolerance, &at) {
                            return Some(difference);
                        }
                    }
                    (expected, found) => return Some((at, brief(expected), brief(found))),
                }
            }
            None
        }
        (Value::Array(expected), Value::Array(found)) if expected.len() == found.len() => {
            expected.iter().zip(found).enumerate().find_map(|(index, (expected, found))| {
                difference(expected, found, tolerance, &format!("{at}/{index}"))
            })
        }
        (Value::Number(a), Value::Number(b)) => match (a.as_f64(), b.as_f64()) {
            _ if a == b => None,
            (Some(a), Some(b)) if (a - b).abs() <= tolerance => None,
            _ => differ(),
        },
        (expected, found) if expected == found => None,
        _ => differ(),
    }
}

fn place(at: &str) -> String {
    if at.is_empty() { "the whole answer".into() } else { at.into() }
}

fn brief(value: Option<&Value>) -> String {
    let Some(value) = value else { return "nothing".into() };
    let text = value.to_string();
    match text.char_indices().nth(BRIEF_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// Of a value that differs, as much is shown.
const BRIEF_CHARS: usize = 80;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn differ(expected: Value, found: Value, tolerance: f64) -> Option<(String, String, String)> {
        difference(&expected, &found, tolerance, "")
    }

    #[test]
    fn answers_are_compared_whole_and_numbers_within_their_tolerance() {
        let golden = json!({"label": "6", "scores": [0.5, 1]});
        assert_eq!(differ(golden.clone(), golden.clone(), 0.0), None);
        assert_eq!(differ(golden.clone(), json!({"label": "6", "scores": [0.5009, 1.0]}), 0.001), None);
        let (at, expected, found) =
            differ(golden.clone(), json!({"label": "6", "scores": [0.51, 1]}), 0.001).unwrap();
        assert_eq!((at.as_str(), expected.as_str(), found.as_str()), ("/scores/0", "0.5", "0.51"));
        assert_eq!(
            differ(golden.clone(), json!({"scores": [0.5, 1]}), 0.0).unwrap().2,
            "nothing",
            "a member is missing"
        );
        assert_eq!(differ(json!({}), json!({"more": 1}), 9.0).unwrap().0, "/more");
        assert_eq!(differ(golden, json!({"label": 6, "scores": [0.5, 1]}), 9.0).unwrap().1, "\"6\"");
        assert_eq!(differ(json!([1]), json!([1, 2]), 9.0).unwrap().0, "the whole answer");
    }

    #[test]
    fn the_file_is_read_or_says_what_it_should_hold() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, r#"[{"input": {"text": "a"}, "output": {}, "tolerance": 0.1}]"#).unwrap();
        assert_eq!(Golden::read(file.path(), None).unwrap().cases.len(), 1);
        std::fs::write(&file, r#"[{"input": {"text": "a"}, "expected": {}}]"#).unwrap();
        let error = Golden::read(file.path(), None).err().unwrap();
        assert!(error.to_string().contains("JSON list of {\"input\", \"output\""), "{error}");
    }
}
