//! Which queues a job may name. Whoever reaches a host could write to, and make, any queue of its brokers otherwise. It never knows
//! how a caller was let in.

use super::{Queues, Route, RouteError};

/// Whose list counts.
#[derive(Clone, Copy, Debug)]
pub enum Allowed<'a> {
    /// The one for all: `queue_config.allowed_queues`.
    ToAll,
    /// A key's own.
    ToKey {
        /// The key's name.
        key: &'a str,
        /// Its list.
        queues: &'a [String],
    },
}

impl<'a> Allowed<'a> {
    /// The key's own where it has one.
    #[must_use]
    pub fn to(key: Option<&'a str>, own: Option<&'a [String]>) -> Self {
        key.zip(own).map_or(Self::ToAll, |(key, queues)| Self::ToKey { key, queues })
    }
}

impl Queues {
    /// Finds the broker of a queue that a job names.
    ///
    /// # Errors
    /// It names a backend that there isn't, or is none of the allowed queues.
    pub fn allowed(&self, name: &str, allowed: Allowed<'_>) -> Result<Route, RouteError> {
        let route = self.route(name)?;
        let (list, setting) = match allowed {
            Allowed::ToKey { key, queues } => {
                (Some(queues), format!("app_settings.auth_config.keys.{key}.allowed_queues"))
            }
            Allowed::ToAll => {
                (self.spec.allowed.as_deref(), "app_settings.queue_config.allowed_queues".to_owned())
            }
        };
        let is_allowed = match list {
            Some(list) => list.iter().any(|entry| self.names(entry, &route)),
            None => self.is_allowed_by_default(&route),
        };
        if is_allowed {
            return Ok(route);
        }
        let expected = match list {
            Some([]) => "none".to_owned(),
            Some(list) => format!("one of {}", list.join(", ")),
            None if self.spec.names.is_empty() => "a queue in memory".to_owned(),
            None => {
                let names: Vec<&str> = self.spec.names.keys().map(String::as_str).collect();
                format!("a queue in memory or one of {}", names.join(", "))
            }
        };
        Err(RouteError(format!("expected {expected}, as {setting} says, found {name:?}")))
    }

    /// What is in memory reaches nobody else, and what is configured is meant.
    fn is_allowed_by_default(&self, route: &Route) -> bool {
        let configured =
            |(queue, backend): (&String, &String)| *queue == route.queue && **backend == *route.backend;
        route.adapter.memory().is_some() || self.spec.names.iter().any(configured)
    }

    fn names(&self, entry: &str, route: &Route) -> bool {
        if entry == "*" {
            return true;
        }
        let (backend, queue) = self.spec.parts_of(entry);
        matches(backend, &route.backend) && matches(queue, &route.queue)
    }
}

/// Whether a text is what a pattern says, in which each `*` stands for any letters, or none.
fn matches(pattern: &str, text: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut text) = text.strip_prefix(first) else { return false };
    let mut parts = rest.split('*').peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return text.ends_with(part);
        }
        let Some(at) = text.find(part) else { return false };
        text = &text[at + part.len()..];
    }
    true
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use modalkit_queue::{BackendContext, MemorySpec, RedisShape, RedisSpec, Spec};

    use super::*;
    use crate::config::QueueSpec;

    fn queues(usual: &str, allowed: Option<&[&str]>) -> std::sync::Arc<Queues> {
        let redis = RedisSpec {
            url: "redis://127.0.0.1:1".to_owned(),
            username: None,
            password: None,
            ca: None,
            shape: RedisShape::List,
            stream_length_max: None,
            message_bytes_max: 1,
            consumer: String::new(),
        };
        let memory = MemorySpec { messages_max: 1, bytes_max: 1 };
        let spec = QueueSpec {
            usual: usual.to_owned(),
            backends: BTreeMap::from([
                ("memory".to_owned(), Spec::Memory(memory)),
                ("redis".to_owned(), Spec::Redis(redis)),
            ]),
            names: BTreeMap::from([("invoices".to_owned(), "redis".to_owned())]),
            allowed: allowed.map(owned),
            ..QueueSpec::default()
        };
        let no_plugins = BackendContext {
            open_plugin: std::sync::Arc::new(|_, _| unreachable!("none is asked for")),
            open_model: std::sync::Arc::new(|_| unreachable!("none is asked for")),
        };
        Queues::open(&spec, &no_plugins).unwrap()
    }

    fn owned(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[tokio::test]
    async fn what_is_in_memory_or_configured_is_allowed_where_nothing_is_said() {
        let queues = queues("memory", None);
        for name in ["any", "memory://any", "invoices", "redis://invoices"] {
            assert!(queues.allowed(name, Allowed::ToAll).is_ok(), "{name}");
        }
        let refused = queues.allowed("redis://any", Allowed::ToAll).err().unwrap().to_string();
        for part in ["a queue in memory or one of invoices", "queue_config.allowed_queues", "redis://any"] {
            assert!(refused.contains(part), "{refused}");
        }
    }

    #[tokio::test]
    async fn a_list_replaces_that_and_a_keys_own_list_replaces_the_list() {
        let general = queues("redis", Some(&["results-*", "memory://*"]));
        for name in ["results-1", "redis://results-2", "memory://any"] {
            assert!(general.allowed(name, Allowed::ToAll).is_ok(), "{name}");
        }
        for name in ["result", "other", "invoices", "redis://other"] {
            assert!(general.allowed(name, Allowed::ToAll).is_err(), "{name}");
        }
        let own = owned(&["other"]);
        let key = Allowed::to(Some("ci"), Some(&own));
        assert!(general.allowed("redis://other", key).is_ok());
        let refused = general.allowed("results-1", key).err().unwrap().to_string();
        assert!(refused.contains("expected one of other, as app_settings.auth_config.keys.ci"), "{refused}");
        let none = general.allowed("memory://any", Allowed::to(Some("ci"), Some(&[]))).err().unwrap();
        assert!(none.to_string().contains("expected none"), "{none}");
        let all = queues("memory", Some(&["*"]));
        assert!(all.allowed("redis://anything", Allowed::ToAll).is_ok());
        assert!(all.allowed("nowhere://anything", Allowed::ToAll).is_err());
    }

    #[test]
    fn a_star_stands_for_anything() {
        for (pattern, text) in [
            ("a", "a"),
            ("*", ""),
            ("*", "x"),
            ("a*", "a"),
            ("*a", "ba"),
            ("a*c", "abbc"),
            ("a*b*c", "a-b-b-c"),
            ("a**b", "ab"),
        ] {
            assert!(matches(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in
            [("a", "ab"), ("a*", "b"), ("*a", "ab"), ("a*a", "a"), ("a*b*c", "acb"), ("", "a")]
        {
            assert!(!matches(pattern, text), "{pattern} {text}");
        }
    }
}
