//! The query's parameters, and names in the path: decoded, and compared with what the endpoint knows. It never knows what a parameter means.

use std::{borrow::Cow, num::IntErrorKind};

use percent_encoding::percent_decode_str;

use crate::work::{Detail, JobError};

/// Letters by which a name may differ from a known one to be taken for a slip of it: of a short one, and of a longer one.
const SLIPS_SHORT: usize = 1;
const SLIPS_LONG: usize = 2;
/// The fewest letters of a longer one.
const LONG: usize = 7;

/// The parameters of a request.
#[derive(Clone, Copy)]
pub(super) struct Query<'q>(&'q str);

impl<'q> Query<'q> {
    /// Of an endpoint that knows these parameters. Others are passed over, as those of gateways and caches; a near miss isn't, since its
    /// caller would be answered as if it had not asked.
    ///
    /// # Errors
    /// [`JobError::Invalid`], which names the parameter that was probably meant.
    pub(super) fn parse(query: Option<&'q str>, known: &[&str]) -> Result<Self, JobError> {
        let query = query.unwrap_or_default();
        for (name, _) in form_urlencoded::parse(query.as_bytes()) {
            if let Some(meant) = near_miss(&name, known) {
                let expected =
                    format!("expected {meant}, found {name}: this endpoint takes no such parameter");
                return Err(invalid(&name, expected));
            }
        }
        Ok(Self(query))
    }

    /// The first value of a parameter.
    pub(super) fn get(self, name: &str) -> Option<Cow<'q, str>> {
        form_urlencoded::parse(self.0.as_bytes()).find(|(found, _)| found == name).map(|(_, value)| value)
    }

    /// A number, no more than `max`.
    ///
    /// # Errors
    /// [`JobError::Invalid`] where it is none.
    pub(super) fn number(self, name: &str, default: usize, max: usize) -> Result<usize, JobError> {
        let Some(text) = self.get(name) else { return Ok(default) };
        match text.parse::<usize>() {
            Ok(number) => Ok(number.min(max)),
            // More than there can be is as much as there may be.
            Err(error) if *error.kind() == IntErrorKind::PosOverflow => Ok(max),
            Err(_) => Err(invalid(name, format!("expected a whole number, found {text:?}"))),
        }
    }

    /// A switch: absent, `true` or `false`.
    ///
    /// # Errors
    /// [`JobError::Invalid`] where it is neither.
    pub(super) fn switch(self, name: &str) -> Result<bool, JobError> {
        match self.get(name).as_deref() {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(other) => Err(invalid(name, format!("expected true or false, found {other:?}"))),
        }
    }
}

/// What is wrong with a parameter.
pub(super) fn invalid(parameter: &str, msg: String) -> JobError {
    JobError::Invalid(vec![Detail {
        loc: vec!["query".into(), parameter.into()],
        msg,
        kind: "value_error".into(),
    }])
}

/// A name in a path. A `+` stands for itself there.
pub(super) fn path_name(text: &str) -> Cow<'_, str> {
    percent_decode_str(text).decode_utf8_lossy()
}

fn near_miss<'k>(found: &str, known: &[&'k str]) -> Option<&'k str> {
    if known.contains(&found) {
        return None;
    }
    let letters = |name: &str| {
        name.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_ascii_lowercase()
    };
    let begins_with_word =
        |whole: &str, word: &str| whole.strip_prefix(word).is_some_and(|rest| rest.starts_with('_'));
    let plain = letters(found);
    let is_near = |name: &&&str| {
        let slips = if name.len() < LONG { SLIPS_SHORT } else { SLIPS_LONG };
        plain == letters(name)
            || begins_with_word(name, found)
            || begins_with_word(found, name)
            || strsim::osa_distance(&found.to_ascii_lowercase(), name) <= slips
    };
    known.iter().find(is_near).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: [&str; 2] = ["model_name", "limit"];

    #[test]
    fn keys_and_values_are_decoded_and_the_first_counts() {
        let query =
            Query::parse(Some("a=b&model%5Fname=a%20b+c%2&model_name=x&limit=7"), &KNOWN).ok().unwrap();
        assert_eq!(query.get("model_name").as_deref(), Some("a b c%2"));
        assert_eq!(query.number("limit", 1, 5).unwrap(), 5);
        let huge = Query::parse(Some("limit=99999999999999999999999"), &KNOWN).ok().unwrap();
        assert_eq!(huge.number("limit", 1, 5).unwrap(), 5);
        assert_eq!(query.get("b"), None);
        assert!(Query::parse(None, &KNOWN).ok().unwrap().get("limit").is_none());
    }

    #[test]
    fn a_near_miss_is_named_and_other_parameters_are_passed_over() {
        for (found, meant) in [
            ("model", "model_name"),
            ("MODEL_NAME", "model_name"),
            ("model-name", "model_name"),
            ("modelName", "model_name"),
            ("modle_name", "model_name"),
            ("limits", "limit"),
            ("limit_max", "limit"),
        ] {
            assert_eq!(near_miss(found, &KNOWN), Some(meant), "{found}");
        }
        for other in ["", "_", "v", "id", "mode", "name", "utm_source", "time", "key", "model_name", "limit"]
        {
            assert_eq!(near_miss(other, &KNOWN), None, "{other}");
        }
    }

    #[test]
    fn a_plus_in_a_path_is_a_plus() {
        assert_eq!(path_name("a+b%20c%2Bd"), "a+b c+d");
    }
}
