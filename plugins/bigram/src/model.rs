//! What follows which word in a text, and how often. It never knows requests.

use std::collections::HashMap;

/// A word of the text that was learnt, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Word(usize);

/// Before the first word of a sentence.
const BEGIN: Word = Word(0);

/// The words of a text, and after each those that followed it, as often as they did.
pub(crate) struct Model {
    /// Each with the blank before it.
    texts: Vec<String>,
    numbers: HashMap<String, Word>,
    followers: Vec<Vec<Word>>,
}

impl Model {
    /// Learns a text; `None` where it has less than two words.
    pub(crate) fn learn(text: &str) -> Option<Self> {
        let mut model =
            Self { texts: vec![String::new()], numbers: HashMap::new(), followers: vec![Vec::new()] };
        let mut last = BEGIN;
        for text in text.split_whitespace() {
            let word = model.number(text);
            model.followers[last.0].push(word);
            last = if model.ends_a_sentence(word) { BEGIN } else { word };
        }
        (model.texts.len() > 2).then_some(model)
    }

    fn number(&mut self, text: &str) -> Word {
        if let Some(known) = self.numbers.get(text) {
            return *known;
        }
        let word = Word(self.texts.len());
        self.texts.push(format!(" {text}"));
        self.followers.push(Vec::new());
        self.numbers.insert(text.to_owned(), word);
        word
    }

    /// The last word of a prompt, where the text has it; otherwise a sentence begins.
    pub(crate) fn last_of(&self, prompt: &str) -> Word {
        let known = prompt.split_whitespace().last().and_then(|text| self.numbers.get(text)).copied();
        known.filter(|word| !self.ends_a_sentence(*word)).unwrap_or(BEGIN)
    }

    /// A word that followed this one.
    pub(crate) fn next(&self, word: Word, random: &mut fastrand::Rng) -> Word {
        let followers = &self.followers[word.0];
        // The text may end with a word that stands nowhere else.
        let followers = if followers.is_empty() { &self.followers[BEGIN.0] } else { followers };
        followers[random.usize(..followers.len())]
    }

    /// A word as it stands in a text, with the blank before it.
    pub(crate) fn text_of(&self, word: Word) -> &str {
        &self.texts[word.0]
    }

    /// Whether a sentence ends with it.
    pub(crate) fn ends_a_sentence(&self, word: Word) -> bool {
        self.texts[word.0].trim_end_matches('"').ends_with(['.', '!', '?'])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_followed_by_what_followed_it_and_a_seed_says_by_which() {
        let model = Model::learn("A b. A c. \"A d!\" e").unwrap();
        let text = |seed| {
            let mut random = fastrand::Rng::with_seed(seed);
            let next = model.next(model.last_of("what A"), &mut random);
            model.text_of(next).to_owned()
        };
        let texts: Vec<String> = (0..50).map(text).collect();
        assert_eq!(texts, (0..50).map(text).collect::<Vec<_>>());
        assert!(texts.iter().all(|text| [" b.", " c."].contains(&text.as_str())));
        assert!(texts.contains(&" b.".to_owned()) && texts.contains(&" c.".to_owned()));
        // What ends a sentence, what is unknown and what stands at the end are followed by a beginning.
        for prompt in ["b.", "unknown", "e", ""] {
            let next = model.next(model.last_of(prompt), &mut fastrand::Rng::with_seed(3));
            assert!([" A", " \"A", " e"].contains(&model.text_of(next)), "{prompt}");
        }
        assert!(Model::learn("alone").is_none());
    }
}
