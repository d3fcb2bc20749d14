//! Lines of a worker's log, each as one packet. It owns their layout.

use modalkit_engine::LogLevel;

/// Bytes of one packet.
pub(crate) const BYTES_MAX: usize = 32 << 10;
/// Bytes of what comes before the texts.
const HEAD_BYTES: usize = 9;
const LEVELS: [LogLevel; 6] =
    [LogLevel::Off, LogLevel::Error, LogLevel::Warn, LogLevel::Info, LogLevel::Debug, LogLevel::Trace];

pub(crate) struct Line {
    pub(crate) level: LogLevel,
    pub(crate) target: String,
    pub(crate) message: String,
    pub(crate) fields: String,
}

pub(crate) fn level_number(level: LogLevel) -> u8 {
    LEVELS.iter().position(|known| *known == level).unwrap_or_default() as u8
}

/// The level of this number, or the most talkative one.
pub(crate) fn level(number: u8) -> LogLevel {
    LEVELS.get(usize::from(number)).copied().unwrap_or(LogLevel::Trace)
}

/// As a packet; what is too long is cut.
pub(crate) fn write(level: LogLevel, target: &str, message: &str, fields: &str) -> Vec<u8> {
    let room = BYTES_MAX - HEAD_BYTES;
    let target = &target[..target.floor_char_boundary(room / 8)];
    // Fields are a text that something reads: whole or not at all.
    let fields = if fields.len() <= room / 4 { fields } else { "" };
    let message = &message[..message.floor_char_boundary(room / 2)];
    let mut packet = vec![level_number(level)];
    packet.extend_from_slice(&(target.len() as u32).to_le_bytes());
    packet.extend_from_slice(&(message.len() as u32).to_le_bytes());
    [target, message, fields].iter().for_each(|text| packet.extend_from_slice(text.as_bytes()));
    packet
}

/// `None` where it is none.
pub(crate) fn read(packet: &[u8]) -> Option<Line> {
    let (head, texts) = packet.split_at_checked(HEAD_BYTES)?;
    let number =
        |bytes: &[u8]| bytes.iter().rev().fold(0_usize, |number, byte| number << 8 | usize::from(*byte));
    let (target, rest) = texts.split_at_checked(number(&head[1..5]))?;
    let (message, fields) = rest.split_at_checked(number(&head[5..]))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Some(Line { level: level(head[0]), target: text(target), message: text(message), fields: text(fields) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_cross_and_what_is_too_long_is_cut() {
        let line = read(&write(LogLevel::Warn, "a::b", "said", "{\"n\":1}")).unwrap();
        assert_eq!(
            (line.level, &*line.target, &*line.message, &*line.fields),
            (LogLevel::Warn, "a::b", "said", "{\"n\":1}")
        );
        let long = "é".repeat(BYTES_MAX);
        let packet = write(LogLevel::Error, &long, &long, &long);
        assert!(packet.len() <= BYTES_MAX);
        let line = read(&packet).unwrap();
        assert!(line.message.len() > BYTES_MAX / 3 && line.fields.is_empty());
        assert!(read(&[]).is_none() && read(&[0xff; 12]).is_none());
    }
}
